# SPDX-License-Identifier: Apache-2.0
"""Decoding with sparse or dense weights: a forward pass of CUDA kernels, a cache of keys and values, a captured step.

From the bottom: ``runtime`` is where kernels run, ``products`` multiply by matrices, ``weights`` are on the device,
``forward`` lists the launches of a pass, ``engine`` fills the cache from prompts and repeats the step of decoding,
``generate`` goes from files to text.
"""
