# SPDX-License-Identifier: Apache-2.0
"""Other systems to compare with, called so that a CUDA graph can capture them."""
