# SPDX-License-Identifier: Apache-2.0
"""Decoding with sparse or dense weights: a forward pass of CUDA kernels, a KV cache and a captured decoding step.

From the bottom up: ``runtime`` runs kernels, ``products`` multiplies by matrices, ``weights`` holds a model's tensors
on the device, ``forward`` lists the launches of a pass, ``engine`` fills the cache from prompts and repeats the
decoding step, and ``generate`` goes from files to text.
"""
