# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as sparse weights, and back; docs/conversion.md."""
