# SPDX-License-Identifier: Apache-2.0
"""Exit statuses of processes other than 0 (fine) and 1 (a failure)."""

from __future__ import annotations

BAD_USAGE = 2
"""A request that cannot be fulfilled."""
PEER_FAILED = 75
"""A rank ended because another one failed."""
INTERRUPTED = 130
"""After Ctrl-C, as a shell reports it."""
