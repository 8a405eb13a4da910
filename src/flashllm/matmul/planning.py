# SPDX-License-Identifier: Apache-2.0
"""Which kernel instance, split and workspace a product takes, decided once and reused for every call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from flashllm.errors import ArgumentError
from flashllm.jit.spec import KernelSpec
from flashllm.matmul import tiled_csl, tune_cache
from flashllm.matmul.stream_k import StreamK

if TYPE_CHECKING:
    from flashllm.device import DeviceFacts
    from flashllm.formats.tiled_csl import TiledCSL

MAX_N = 65535 * 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How y[N, M] = x[N, K] @ W[M, K]^T is computed for one weight shape and ``n`` rows of x."""

    shape: tuple[int, int]
    """M, K of the weight."""
    dtype: str
    n: int
    """The N this plan is for."""
    choice: tiled_csl.Choice
    split: StreamK
    source: Literal["auto", "tuned", "forced"]
    """Heuristic, measured on this device, or given by the caller."""
    reason: str

    @property
    def spec(self) -> KernelSpec:
        """The kernel instance."""
        return self.choice.spec

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the tiles of W and along N."""
        return self.split.blocks, self.split.column_blocks

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the workspace: zero it once; every call leaves its counters zero. 0: none needed."""
        return self.split.workspace_bytes


def plan(w: TiledCSL, n: int, *, device: DeviceFacts | None = None, choice: tiled_csl.Choice | None = None) -> Plan:
    """Plan the product of ``w`` with ``n`` rows of x.

    ``device`` (default: the current GPU) may describe a GPU that is not there. ``choice`` forces an instance;
    without one, a measured choice of ``flashllm tune`` is taken, else the heuristic's.

    Raises :class:`ArgumentError` for an impossible ``n``, :class:`MissingDependencyError` without a GPU.
    """
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_N:
        raise ArgumentError("n", expected=f"an integer from 1 to {MAX_N}", got=repr(n))
    if device is None:
        from flashllm.device import device_facts

        device = device_facts()
    source: Literal["auto", "tuned", "forced"] = "forced"
    if choice is None:
        choice, source = tune_cache.lookup(w, n, device=device), "tuned"
    if choice is None:
        choice, source = tiled_csl.default_choice(w, n, arch=device.arch), "auto"
    choice = replace(choice, dtype=w.dtype, aligned=w.shape[1] % 8 == 0)
    if not choice.spec.supports(device.arch):
        raise ArgumentError("choice", expected=f"an instance for {device.arch}", got=choice.spec.label)
    split = tiled_csl.split_for(w, n, choice, sm_count=device.sm_count)
    return Plan(
        shape=w.shape,
        dtype=w.dtype,
        n=n,
        choice=choice,
        split=split,
        source=source,
        reason=_reason(w, choice, split, device, source),
    )


def _reason(w: TiledCSL, choice: tiled_csl.Choice, split: StreamK, device: DeviceFacts, source: str) -> str:
    path = "wgmma" if choice.slices == tiled_csl.WARPGROUP else f"mma.sync, {choice.slices} K slices"
    return (
        f"{source}: {split.tiles_m}x{split.tiles_k} tiles over {split.blocks}x{split.column_blocks} blocks "
        f"on {device.sm_count} SMs ({split.tiles / split.blocks:.1f} tiles each), {path}, N blocks of "
        f"{choice.n_block}, {choice.vectors} vectors per thread for at most {w.max_tile_words} words per tile"
    )
