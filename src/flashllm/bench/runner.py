# SPDX-License-Identifier: Apache-2.0
"""Runs cases on the GPU: packs the weights, checks, times all systems side by side, checks again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashllm.baselines import SYSTEMS
from flashllm.baselines.cublas import Cublas, Layout
from flashllm.bench import check, comparisons, systems, telemetry, timing
from flashllm.bench.bandwidth import BUFFER_BYTES, read_gbps
from flashllm.bench.cases import Group
from flashllm.bench.data import largest_magnitude, make_inputs, to_float64
from flashllm.bench.environment import Environment
from flashllm.bench.rows import make_row
from flashllm.bench.runner_types import Emit, Wanted
from flashllm.bench.runs import Compared, Prepared, Run
from flashllm.bench.sources import Source
from flashllm.errors import DeviceMemoryError
from flashllm.formats.weight import SparseWeight
from flashllm.matmul.expand import LEAST_N
from flashllm.progress import Advance
from flashllm.registry import kernel, weight_class

_SPARE_BYTES = 2**30  # float64 rows of the reference, workspaces, inputs, outputs


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run measures; ``check_rows`` is how many rows of W are compared with float64."""

    method: timing.Method = field(default_factory=timing.Method)
    layouts: tuple[Layout, ...] = systems.LAYOUTS_BOTH
    check_rows: int = 512
    ablation: bool = False
    """Also measure our kernel without each of its ideas, where such instances exist (fp16, N = 9 to 16)."""
    pdl: bool = False
    """Also measure launches of our kernel that may overlap each other, in graphs."""
    compared: tuple[str, ...] = ()
    """Systems of :data:`flashllm.baselines.SYSTEMS` to measure as well."""


Packing = tuple["float | None", str, str]
"""Sparsity, format, and which of its ``ENCODINGS``; only the ablation uses any but the default."""


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """Everything of one group that is on the device."""

    group: Group
    inputs: dict[int, Any]
    """x by N."""
    prepared: dict[float | None, Prepared]
    packed: dict[Packing, list[SparseWeight]]
    """Rotating copies of the packed weights."""
    dense: dict[str, list[Any]]
    """Rotating copies of the dense weights of the last entry of ``prepared``, by layout."""
    dense_item: Prepared
    compared: dict[str, Compared]
    """Weights of other systems, by name."""


def required_bytes(group: Group, source: Source, settings: Settings, l2_bytes: int) -> int:
    """Approximate maximum of the device bytes that measuring ``group`` takes."""
    parts = comparisons.parts(group, settings.compared)
    return max(_required_bytes(part, names, source, settings, l2_bytes) for part, names in parts)


def _required_bytes(group: Group, compared: Sequence[str], source: Source, settings: Settings, l2_bytes: int) -> int:
    def rotated(n_bytes: int) -> int:
        return n_bytes * timing.rotation_copies(n_bytes, l2_bytes, settings.method.l2)

    shape, needed = (group.m, group.k), 0
    largest = 0
    for name in group.formats:
        made = weight_class(name)
        using = [s for s in group.sparsities if name in group.formats_for(s)]
        packed = [made.estimated_bytes(shape, source.density(s)) for s in using]
        needed += sum(map(rotated, packed)) * (len(made.ENCODINGS) if settings.ablation else 1)
        largest = max([largest, *packed])
    if max(group.batches) >= LEAST_N:
        needed += 2 * group.dense_bytes  # a plan may expand the weight
    kinds = len({layout.w for layout in settings.layouts})
    encoding = (group.dense_bytes + largest) // 4
    densest = max(source.density(s) for s in group.sparsities)
    needed += comparisons.estimated_bytes(group, densest, compared, rotated)
    needed += kinds * rotated(group.dense_bytes) + encoding + _SPARE_BYTES
    return max(needed, 2 * BUFFER_BYTES)  # the bandwidth measurement comes first


def check_memory(groups: Iterable[Group], source: Source, settings: Settings) -> None:
    """Raise :class:`DeviceMemoryError` before any work when a group does not fit on the current GPU."""
    from flashllm.device import device_facts, free_memory

    free = free_memory()
    for group in groups:
        needed = required_bytes(group, source, settings, device_facts().l2_bytes)
        if needed > free:
            raise DeviceMemoryError(f"benchmark of {group.title}", needed=needed, free=free)


class CudaRunner:
    """One run on the current GPU. ``emit`` gets every row as soon as it is known."""

    def __init__(self, environment: Environment, settings: Settings, source: Source, emit: Emit) -> None:
        import cupy

        self._environment, self._settings, self._source, self._emit = environment, settings, source, emit
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self.read_gbps = 0.0

    def run(self, groups: Iterable[Group], *, wanted: Wanted, advance: Advance) -> None:
        """Measure every ``wanted`` case of ``groups``; ``advance(title, cases)`` follows the progress."""
        import cupy

        from flashllm.device import device_facts, memory_errors

        with self._stream, Cublas() as cublas:
            advance("read bandwidth", 0)
            self.read_gbps = read_gbps(self._stream)
            every = [part for group in groups for part in comparisons.parts(group, self._settings.compared)]
            for group, compared in every:
                cases = {
                    n: [(s, f) for s, count, f in group.cases if count == n and wanted(group, s, n, f)]
                    for n in group.batches
                }
                cases = {n: packings for n, packings in cases.items() if packings}
                if not cases:
                    continue
                needed = _required_bytes(group, compared, self._source, self._settings, device_facts().l2_bytes)
                with memory_errors(f"benchmark of {group.title}", needed):
                    self._run_group(group, cases, compared, cublas, advance)
                cupy.get_default_memory_pool().free_all_blocks()

    def _run_group(
        self,
        group: Group,
        cases: dict[int, list[tuple[float | None, str]]],
        compared: Sequence[str],
        cublas: Cublas,
        advance: Advance,
    ) -> None:
        advance(f"{group.title}: packing", 0)
        wanted = {packing for packings in cases.values() for packing in packings}
        needed = [(s, [f for f in group.formats if (s, f) in wanted]) for s in group.sparsities]
        loaded = self._load(group, [(s, formats) for s, formats in needed if formats], list(cases), compared, cublas)
        for n, packings in cases.items():
            advance(f"{group.title}: N = {n}", 0)
            self._measure(loaded, n, packings, compared, cublas)
            advance(f"{group.title}: N = {n}", len(packings))

    def _load(
        self,
        group: Group,
        needed: Sequence[tuple[float | None, Sequence[str]]],
        batches: Sequence[int],
        compared: Sequence[str],
        cublas: Cublas,
    ) -> _Loaded:
        """``needed``: sparsities, each with the formats to pack its matrix in."""
        from flashllm.device import device_facts

        l2_bytes, l2 = device_facts().l2_bytes, self._settings.method.l2
        inputs = {n: make_inputs(group, n, device=True) for n in batches}
        prepared: dict[float | None, Prepared] = {}
        packed: dict[Packing, list[SparseWeight]] = {}
        dense: Any = None
        for sparsity, formats in needed:
            dense = None  # never two dense matrices at a time
            dense = self._source.dense(group, sparsity, device=True)
            for name in formats:
                made = weight_class(name)
                for encoding in made.ENCODINGS if self._settings.ablation else ("default",):
                    weight = made.from_dense(dense, dtype=group.dtype, **made.ENCODINGS[encoding])
                    copies = timing.rotation_copies(weight.nbytes, l2_bytes, l2)
                    packed[sparsity, name, encoding] = systems.rotation(weight, copies)
            nnz = packed[sparsity, formats[0], "default"][0].nnz
            prepared[sparsity] = self._prepare(group, sparsity, dense, nnz, inputs, cublas)
        others = comparisons.load(
            compared,
            group,
            dense,
            prepared[needed[-1][0]],
            inputs,
            prepare=lambda its_group, sparsity, matrix, x: self._prepare(its_group, sparsity, matrix, None, x, cublas),
            copies=lambda n_bytes: timing.rotation_copies(n_bytes, l2_bytes, l2),
        )
        # cuBLAS runs on the sparsest matrix: its time hardly depends on the values; zeros can only help it.
        copies = timing.rotation_copies(group.dense_bytes, l2_bytes, l2)
        return _Loaded(
            group=group,
            inputs=inputs,
            prepared=prepared,
            packed=packed,
            dense=systems.dense_copies(dense, copies, self._settings.layouts),
            dense_item=prepared[needed[-1][0]],
            compared=others,
        )

    def _prepare(
        self,
        group: Group,
        sparsity: float | None,
        dense: Any,
        nnz: int | None,
        inputs: dict[int, Any],
        cublas: Cublas,
    ) -> Prepared:
        """What products of ``dense`` must give; ``nnz`` of its elements are not zero (``None``: they are counted)."""
        import cupy

        if nnz is None:
            nnz = int(cupy.count_nonzero(dense))
        rows = cupy.asarray(check.sample_rows(group.m, self._settings.check_rows, group.seed))
        sampled = to_float64(dense[rows], group.dtype)
        references, outputs = {}, {}
        for n, x in inputs.items():
            references[n] = check.make_reference(to_float64(x, group.dtype), sampled, rows, group.dtype)
            outputs[n] = systems.empty_output(n, group.m, group.dtype)
            cublas.matmul(x, dense, outputs[n], dtype=group.dtype)
        return Prepared(
            sparsity=sparsity,
            sparsity_real=1.0 - nnz / (group.m * group.k),
            largest=largest_magnitude(dense, group.dtype),
            references=references,
            outputs=outputs,
        )

    def _ablation(self, loaded: _Loaded, ours: systems.FlashLLM, packing: tuple[float | None, str]) -> list[Run]:
        """Our kernel without one idea at a time: first on other encodings of the weight, then in its own variants."""
        sparsity, name = packing
        dtype, item, choice = loaded.group.dtype, loaded.prepared[sparsity], ours.plan.choice
        variants = kernel(name).ablation(choice) if self._settings.ablation else {}
        if not variants:
            return []
        runs = []
        for encoding in weight_class(name).ENCODINGS:
            if encoding != "default":
                other = systems.FlashLLM(loaded.packed[sparsity, name, encoding], ours.x, dtype, choice=choice)
                runs.append(Run.of_ours(other, item, loaded.group, ablation=encoding))
        for idea, variant in variants.items():
            system = systems.FlashLLM(ours.weights, ours.x, dtype, choice=variant)
            runs.append(Run.of_ours(system, item, loaded.group, ablation=idea))
        return runs

    def _best_cublas(self, loaded: _Loaded, n: int, cublas: Cublas, name: str, *, tensor_cores: bool = True) -> Run:
        group, x = loaded.group, loaded.inputs[n]
        library = systems.best_cublas(
            cublas,
            loaded.dense,
            x,
            systems.empty_output(n, group.m, group.dtype),
            layouts=self._settings.layouts,
            dtype=group.dtype,
            stream=self._stream,
            tensor_cores=tensor_cores,
        )
        return Run.of_cublas(library, loaded.dense_item, group, x, name=name)

    def _others(self, loaded: _Loaded, n: int, compared: Sequence[str], cublas: Cublas) -> list[Run]:
        """The other systems, each at its best."""
        runs = []
        for name in compared:
            if SYSTEMS[name].weight is None:
                runs.append(self._best_cublas(loaded, n, cublas, name, tensor_cores=False))
            elif name in loaded.compared:
                run = comparisons.run_of(loaded.compared[name], n, self._stream)
                runs += [run] if run is not None else []
        return runs

    def _measure(
        self,
        loaded: _Loaded,
        n: int,
        packings: Sequence[tuple[float | None, str]],
        compared: Sequence[str],
        cublas: Cublas,
    ) -> None:
        group, x, method = loaded.group, loaded.inputs[n], self._settings.method
        runs = [self._best_cublas(loaded, n, cublas, "cublas")]
        for sparsity, name in packings:
            ours = systems.FlashLLM(loaded.packed[sparsity, name, "default"], x, group.dtype)
            runs.append(Run.of_ours(ours, loaded.prepared[sparsity], group))
            if self._settings.pdl and ours.plan.expansion is None:
                overlapping = systems.FlashLLM(ours.weights, x, group.dtype, overlaps=True)
                runs.append(Run.of_ours(overlapping, loaded.prepared[sparsity], group))
            runs += self._ablation(loaded, ours, (sparsity, name))
        if method.launch == "stream" and group.dtype == "fp16":
            matmul = systems.best_cupy(loaded.dense["mk"], x, group.dtype, stream=self._stream)
            runs.append(Run.of_cupy(matmul, loaded.dense_item, group, x))
        runs += self._others(loaded, n, compared, cublas)
        for run in runs:
            run.check(0, self._stream)
        readings = [telemetry.Reading()]
        timings = timing.measure(
            [run.system for run in runs],
            method,
            stream=self._stream,
            under_load=lambda: readings.append(telemetry.read()),
        )
        for run in runs:
            if run.overlaps:  # check the output that a whole graph has left: a single launch overlaps nothing
                run.compare()
            run.check(run.system.copies - 1, self._stream)
        for run, result in zip(runs, timings, strict=True):
            row = make_row(
                self._environment,
                run.group,
                n,
                run.measured(result, timings[0].median_us),
                method=method,
                read_gbps=self.read_gbps,
                reading=readings[-1],
            )
            self._emit(row)
