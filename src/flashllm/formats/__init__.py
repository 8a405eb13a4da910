# SPDX-License-Identifier: Apache-2.0
"""Sparse weight formats: encode, decode, check, count bytes. Nothing here depends on a kernel.

``weight.py`` has their common base class; ``flashllm.registry`` knows them by name.
"""
