# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint to sparse weights, and back; docs/conversion.md."""
