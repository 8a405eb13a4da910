# SPDX-License-Identifier: Apache-2.0
"""Checks every kernel instance of a backend on shapes, patterns and values that expose mistakes."""
