# SPDX-License-Identifier: Apache-2.0
"""Kernels of a decoder beside its matrices: one module for each file of ``cuda/decoder``, of the same name.

A forward pass has R rows, each a token: of one sequence (its slot in the cache of keys and values) at one position.
When decoding, that is a row for each sequence; in prefill the rows of the prompts, one after the other, without
padding. Every launch may be captured in a CUDA graph: what changes from step to step is in device memory.
"""

MODULES = ("embed", "norm", "append", "activate", "attention", "grouped_attention", "prefill", "sample")
