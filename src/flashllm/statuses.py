# SPDX-License-Identifier: Apache-2.0
"""Exit statuses of processes beside 0 (fine) and 1 (a failure)."""

from __future__ import annotations

BAD_USAGE = 2
"""Something the user asked for cannot be."""
PEER_FAILED = 75
"""Of a rank that ends because another has failed."""
INTERRUPTED = 130
"""After Ctrl-C, as a shell reports it."""
