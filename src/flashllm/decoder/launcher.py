# SPDX-License-Identifier: Apache-2.0
"""How the host functions of this package launch a kernel, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flashllm.jit.spec import KernelSpec

Launch = Callable[[KernelSpec, Sequence[int], Sequence[Any]], object]
"""``launch(spec, grid, args)``: CuPy arrays on a GPU, NumPy arrays on the emulator; NumPy scalars."""
