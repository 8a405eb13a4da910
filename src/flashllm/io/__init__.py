# SPDX-License-Identifier: Apache-2.0
"""Files: the container of sparse weights and the readers of matrices to encode."""
