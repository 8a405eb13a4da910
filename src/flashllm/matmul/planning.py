# SPDX-License-Identifier: Apache-2.0
"""Which kernel instance, split and workspace a product takes, decided once and reused for every call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from flashllm.device import DeviceFacts, check_facts
from flashllm.errors import ArgumentError
from flashllm.formats.weight import SparseWeight
from flashllm.gpus import gpu_of
from flashllm.jit.spec import MAX_GRID_YZ, KernelSpec
from flashllm.matmul import expand as expanding
from flashllm.matmul import model, tune_cache
from flashllm.matmul.expand import Expansion
from flashllm.matmul.kernel import KernelChoice, Split
from flashllm.registry import kernel


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How y[N, M] = x[N, K] @ W[M, K]^T is computed for one format, weight shape and ``n`` rows of x."""

    format: str
    shape: tuple[int, int]
    """M, K of the weight."""
    dtype: str
    n: int
    """The N this plan is for."""
    choice: KernelChoice
    """Of the class ``Choice`` of the format's kernel module."""
    split: Split
    source: Literal["auto", "tuned", "forced"]
    """The heuristic, measured on this device, or given by the caller."""
    reason: str
    expansion: Expansion | None = None
    """If set, W is expanded on the GPU and cuBLAS multiplies; ``choice`` and ``split`` are for where that cannot be."""

    @property
    def label(self) -> str:
        """The kernel instance, or that W is expanded, for tables and rows."""
        return self.spec.label if self.expansion is None else expanding.LABEL

    @property
    def spec(self) -> KernelSpec:
        """The kernel instance."""
        return self.choice.spec

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the tiles of W and along N."""
        return self.split.grid

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the workspace: zero it once; every call leaves it zero, so plans may share one. 0: none needed.

        For an expansion, the bytes of the dense matrix, which a call leaves there: no plan of another kind may then use
        that workspace.
        """
        return self.split.workspace_bytes if self.expansion is None else self.expansion.scratch_bytes

    @property
    def scratch_bytes(self) -> int:
        """Bytes of scratch memory, which may hold anything, such as what another product left there. 0: none needed."""
        return self.split.scratch_bytes if self.expansion is None else 0


def plan(
    w: SparseWeight,
    n: int,
    *,
    device: DeviceFacts | None = None,
    choice: KernelChoice | None = None,
    expand: bool | None = None,
) -> Plan:
    """Plan the product of ``w`` with ``n`` rows of x.

    ``device`` (default: the current GPU) may describe a GPU that is not present. ``choice``, of the class ``Choice`` of
    the format's kernel module, forces an instance; without it, a choice measured by ``flashllm tune`` is taken or, if
    there is none, the heuristic's. ``n`` may be as large as 65,535 column blocks of the instance.

    ``expand`` says whether to expand the weight to a dense matrix in the workspace, which cuBLAS then multiplies
    (``flashllm.matmul.expand``). By default, this is done where it was measured to be faster than the kernel or, if
    nothing was measured, where the time model expects it to be: for more than 64 columns and large matrices. ``False``
    keeps the workspace small and has the sums computed by our kernels.

    Raises :class:`ArgumentError` for a wrong argument or an impossible ``n``, :class:`MissingDependencyError` without a
    GPU.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ArgumentError("n", expected="an integer from 1 on", got=repr(n))
    if not isinstance(w, SparseWeight):
        raise ArgumentError("w", expected="a sparse weight such as flashllm.TiledCSL", got=type(w).__name__)
    if device is None:
        from flashllm.device import device_facts

        device = device_facts()
    check_facts(device)
    module = kernel(w.format)
    source: Literal["auto", "tuned", "forced"] = "forced"
    found: Any = choice
    measured = None
    if found is None:
        measured = tune_cache.find(w, n, device=device)
        found, source = (None if measured is None else measured.choice), "tuned"
    if found is None:
        found, source = module.default_choice(w, n, arch=device.arch), "auto"
    if not isinstance(found, module.Choice):
        expected = f"one of the kernel for {w.format}, {module.Choice.__module__}.{module.Choice.__qualname__}"
        raise ArgumentError("choice", expected=expected, got=f"{type(found).__module__}.{type(found).__qualname__}")
    layout = {name: getattr(w, name) for name in w.LAYOUT}
    found = replace(found, dtype=w.dtype, aligned=w.shape[1] % 8 == 0, **layout)
    if not found.spec.supports(device.arch):
        raise ArgumentError("choice", expected=f"an instance for {device.arch}", got=found.spec.label)
    split = module.split_for(w, n, found, sm_count=device.sm_count)
    if split.grid[1] > MAX_GRID_YZ:
        expected = f"columns for at most {MAX_GRID_YZ} blocks of {found.n_block}"
        raise ArgumentError("n", expected=expected, got=str(n))
    why = module.reason(w, found, split, sm_count=device.sm_count)
    expansion = None
    if expand is None and choice is None:
        expand = measured.expanded if measured is not None else _expansion_pays(w, n, device)
    if expand:
        expansion = expanding.expansion_of(w)
        if expansion is None:
            raise ArgumentError("expand", expected="a format with a decoder on the GPU", got=w.format)
        blocks = split.grid[1]
        why = f"expanded to {expansion.scratch_bytes:,} bytes for cuBLAS, instead of {blocks} column blocks: {why}"
    return Plan(
        format=w.format,
        shape=w.shape,
        dtype=w.dtype,
        n=n,
        choice=found,
        split=split,
        source=source,
        reason=f"{source}: {why}",
        expansion=expansion,
    )


def _expansion_pays(w: SparseWeight, n: int, device: DeviceFacts) -> bool:
    """Whether the model expects an expansion to be faster than the kernel."""
    if n < expanding.LEAST_N or not model.is_modelled(w.format):
        return False
    m, k = w.shape
    gpu = gpu_of(device)
    return expanding.expected(
        w.format, m=m, k=k, n=n, weight_bytes=w.nbytes, density=w.density, gpu=gpu
    ).expand  # fmt: skip
