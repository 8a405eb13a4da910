# SPDX-License-Identifier: Apache-2.0
"""Exit statuses of processes beside 0 (fine), 1 (a failure) and 2 (bad usage)."""

from __future__ import annotations

PEER_FAILED = 75
"""Of a rank that ends because another has failed."""
INTERRUPTED = 130
"""After Ctrl-C, as a shell reports it."""
