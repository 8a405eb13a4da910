# SPDX-License-Identifier: Apache-2.0
"""Callbacks that tell a runner which cases to measure, and take its rows."""

from __future__ import annotations

from collections.abc import Callable

from flashllm.bench.cases import Group
from flashllm.bench.results import Row

Emit = Callable[[Row], None]
"""Takes a row as soon as it is known."""

Wanted = Callable[[Group, "float | None", int, str], bool]
"""Whether the case (group, sparsity, N, format) is to be measured."""
