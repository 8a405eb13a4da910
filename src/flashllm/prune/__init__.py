# SPDX-License-Identifier: Apache-2.0
"""Zero the unimportant elements of a model's linear layers: magnitude, Wanda, SparseGPT, with NumPy or CuPy."""
