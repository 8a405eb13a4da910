# SPDX-License-Identifier: Apache-2.0
"""Sparse weight formats: encode, decode, check, count bytes. No kernel is known here.

``weight.py`` has the base class of all; ``flashllm.registry`` knows them by name.
"""
