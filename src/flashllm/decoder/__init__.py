# SPDX-License-Identifier: Apache-2.0
"""Kernels of a decoder other than its matrix products: one module per file of ``cuda/decoder``, of the same name.

A forward pass has R rows. Each is a token of one sequence (its slot in the cache of keys and values) at one position.
Decoding has one row per sequence; prefill has the rows of the prompts, one prompt after the other, without padding.
Every launch may be captured in a CUDA graph: what changes from step to step is in device memory.
"""

MODULES = ("embed", "norm", "append", "activate", "attention", "grouped_attention", "prefill", "sample")
