# SPDX-License-Identifier: Apache-2.0
"""Fit the time model of ``flashllm.matmul.model`` to measured rows, and say how good it is.

::

    python experiments/fit_model.py            # quality of the model in the package, on the rows it was fitted to
    python experiments/fit_model.py --write    # fit anew to all rows of that GPU, write model and docs/auto.md

Takes the rows of ``experiments/results`` that were measured on an H200, L2-cold in graphs, fp16, uniform zeros,
with a right result, in formats named on the command line, and in one block of columns; of repeated measurements the
last counts. For each format and width of the column block, the constants of ``KernelTime`` are those that minimise the
squared errors of log time; so are those of ``DenseTime``. A row's own read bandwidth stands in for the GPU's.

Regret is what the model's choice loses: the measured time of the format that the model takes, divided by that of the
fastest format, minus 1, over the cases for which several formats were measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean

import click
import numpy as np
from scipy.optimize import least_squares

from flashllm.bench import results, roofline
from flashllm.bench.results import Row
from flashllm.gpus import Gpu, find_gpu
from flashllm.matmul import expand, model
from flashllm.matmul.model import DenseTime, KernelTime, Model
from flashllm.matmul.tensor_cores import n_block_for
from flashllm.registry import FORMATS, kernel, weight_class

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "experiments" / "results"
DOCUMENT = REPOSITORY / "docs" / "auto.md"
BEGIN, END = "<!-- fit: `python experiments/fit_model.py` -->\n", "<!-- end of fit -->"
GPU = find_gpu("H200")
TILE_BYTES = {"slot24": 1024 + 1024 + 512 + 68}
"""Masks, picks, columns, and front and places of a tile of slots; docs/formats/slot24.md."""
UNSEEN = ("20261124T175218-h100-80gb-hbm3-smollm2-ffn-down.jsonl", "20261124T175154-h100-80gb-hbm3-opt-sweep.jsonl")
"""Files it is not fitted to, from an H100 (two thirds of the bandwidth): a small real matrix; the twelve shapes."""
WIDE_SHAPE = (28672, 8192)
_DIGITS = 4
_MAX_SHARPNESS = 16.0
Shape = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Relative errors of predicted times over some rows."""

    name: str
    n: int | None
    rows: int
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The fastest formats of the shapes with the same zeros and N."""

    zeros: float
    n: int
    measured: tuple[str, ...]
    """Formats that have rows."""
    fastest: list[tuple[str, int]]
    """Formats, each with the number of shapes for which it is the fastest."""
    speedup: float
    """Geometric mean over the shapes of the fastest's speed-up over cuBLAS."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The format that the model takes for one case, and the fastest one."""

    case: tuple[int, int, tuple[int, ...], float]
    """M, K, the N it is chosen for, zeros."""
    taken: str
    best: str
    regret: float


def read_rows(files: Iterable[Path]) -> list[Row]:
    """The rows to fit to: the last of each case, in the order of the files' names."""
    rows = [row for file in sorted(files, key=lambda file: file.name) for row in results.read(file)]
    words = set(GPU.name.lower().split())
    return [
        row
        for row in results.latest([row for row in rows if row.choice != "auto-format"])
        if row.system in ("flashllm", "cublas")
        and row.median_us is not None
        and row.read_gbps is not None
        and words.issubset((row.gpu or "").lower().split())
        and (row.check, row.l2, row.launch, row.dtype, row.pattern) == ("pass", "cold", "graph", "fp16", "uniform")
        and (row.system == "cublas" or widths_of(row.format)[-1] >= row.N)
    ]


def default_files() -> list[Path]:
    """Every file of rows from an H200, except those from before 2026-11-30, which are of other kernels."""
    return sorted(file for file in RESULTS.glob("*-h200-*.jsonl") if file.name >= "20261130")


def gpu_at(row: Row) -> Gpu:
    """The GPU with the bandwidth that the run of ``row`` measured."""
    return replace(GPU, read_gbps=row.read_gbps or GPU.read_gbps)


def weight_bytes(row: Row) -> int:
    """Bytes of the packed weight."""
    return row.bytes - roofline.product_bytes(row.M, row.K, row.N, 0)


def predicted(row: Row, fitted: Model) -> float:
    """Microseconds that ``fitted`` predicts for ``row``."""
    if row.system == "cublas":
        return model.dense_us(row.M, row.K, row.N, gpu=gpu_at(row), model=fitted)
    return model.predict(
        row.format,
        m=row.M,
        k=row.K,
        n=row.N,
        weight_bytes=weight_bytes(row),
        density=1 - row.sparsity_real,
        gpu=gpu_at(row),
        model=fitted,
    ).us


def measured(row: Row) -> float:
    """Measured microseconds of ``row``."""
    assert row.median_us is not None
    return row.median_us


def fit(files: Sequence[Path]) -> Model:
    """The model with the least squared errors of log time over the rows of ``files``."""
    rows = read_rows(files)
    grouped: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.system == "flashllm":
            grouped[row.format, n_block_for(row.N, widths_of(row.format))].append(row)
    kernels: dict[str, dict[int, KernelTime]] = {name: {} for name in FORMATS}
    for (name, width), group in sorted(grouped.items()):
        kernels[name][width] = _fit_kernel(name, width, group)
    used = {row.run_id for row in rows}
    return Model(
        kernels={name: widths for name, widths in kernels.items() if widths},
        dense=_fit_dense([row for row in rows if row.system == "cublas"]),
        tile_bytes=TILE_BYTES,
        gpu=GPU.name,
        files=tuple(file.name for file in files if used & {row.run_id for row in results.read(file)}),
        commits=tuple(sorted({str(row.commit)[:10] for row in rows})),
    )


def widths_of(format_name: str) -> Sequence[int]:
    """Widths of the column blocks that plans take for the format on the GPU, ascending."""
    return sorted({choice.n_block for choice in kernel(format_name).typical(GPU.arch)})


def _fit_kernel(name: str, width: int, rows: Sequence[Row]) -> KernelTime:
    loads = [
        model.load_of(
            row.M,
            row.K,
            row.N,
            weight_bytes=weight_bytes(row),
            density=1 - row.sparsity_real,
            tile_bytes=TILE_BYTES.get(name),
        )
        for row in rows
    ]  # fmt: skip

    def times(p: Sequence[float]) -> list[float]:
        constants = KernelTime(start_us=p[0], tile_cycles=p[1], value_cycles=p[2] / 1000, sharpness=p[3])
        return [
            constants.predict(load, n_block=width, column_blocks=-(-row.N // width), gpu=gpu_at(row)).us
            for load, row in zip(loads, rows, strict=True)
        ]

    start, tile, value, sharpness = _least_squares(
        times, rows, start=[5, 500, 10, 6], upper=[50, 10_000, 5000, _MAX_SHARPNESS]
    )
    return KernelTime(
        start_us=_round(start), tile_cycles=_round(tile), value_cycles=_round(value / 1000),
        sharpness=_round(max(sharpness, 1.0)),
    )  # fmt: skip


def _fit_dense(rows: Sequence[Row]) -> DenseTime:
    def times(p: Sequence[float]) -> list[float]:
        constants = DenseTime(start_us=p[0], read_share=p[1])
        return [constants.us(row.M, row.K, row.N, gpu=gpu_at(row)) for row in rows]

    start, share = _least_squares(times, rows, start=[3, 0.95], upper=[50, 1])
    return DenseTime(start_us=_round(start), read_share=_round(share))


def _least_squares(
    times: Callable[[Sequence[float]], list[float]], rows: Sequence[Row], *, start: list[float], upper: list[float]
) -> list[float]:
    wanted = np.log([measured(row) for row in rows])
    lower = [1e-9, *([1e-9] * (len(start) - 2)), 0.5]
    found = least_squares(
        lambda p: np.log(times(p)) - wanted, start, bounds=(lower, upper), x_scale=np.maximum(start, 1.0)
    )
    return [float(value) for value in found.x]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}") if value > 1e-6 else 0.0


def errors(rows: Sequence[Row], fitted: Model) -> list[Quality]:
    """How far predicted times are off, per format (or dense) and N, and per format over all N."""
    found: dict[tuple[str, int | None], list[float]] = defaultdict(list)
    for row in rows:
        for n in (row.N, None):
            found[row.format, n].append(abs(predicted(row, fitted) / measured(row) - 1))
    place = {name: i for i, name in enumerate((*FORMATS, "dense"))}
    ordered = sorted(found.items(), key=lambda item: (place[item[0][0]], item[0][1] or math.inf))
    return [
        Quality(name=name, n=n, rows=len(values), mean=fmean(values), largest=max(values))
        for (name, n), values in ordered
    ]


def choices(rows: Sequence[Row], fitted: Model) -> list[Choice]:
    """The model's choices for each N alone, where several formats were measured."""
    cases: dict[tuple[int, int, int, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row.system == "flashllm" and row.sparsity is not None:
            cases[row.M, row.K, row.N, row.sparsity].append(row)
    found = []
    for (m, k, n, zeros), group in sorted(cases.items()):
        if len(group) > 1:
            best = min(group, key=measured)
            taken = min(group, key=lambda row: predicted(row, fitted))
            regret = measured(taken) / measured(best) - 1
            found.append(Choice(case=(m, k, (n,), zeros), taken=taken.format, best=best.format, regret=regret))
    return found


def joint_choices(rows: Sequence[Row], fitted: Model, batches: tuple[int, ...] = (8, 16, 32)) -> list[Choice]:
    """The model's choices for all of ``batches`` together, by the geometric mean of the times."""
    cases: dict[tuple[int, int, float], dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.system == "flashllm" and row.sparsity is not None:
            cases[row.M, row.K, row.sparsity][row.format][row.N] = row
    found = []
    for (m, k, zeros), by_format in sorted(cases.items()):
        whole = {name: [by_n[n] for n in batches] for name, by_n in by_format.items() if set(batches) <= set(by_n)}
        if len(whole) > 1:
            real = {name: fmean(math.log(measured(row)) for row in group) for name, group in whole.items()}
            modelled = {name: fmean(math.log(predicted(row, fitted)) for row in group) for name, group in whole.items()}
            best, taken = min(real, key=real.__getitem__), min(modelled, key=modelled.__getitem__)
            regret = math.exp(real[taken] - real[best]) - 1
            found.append(Choice(case=(m, k, batches, zeros), taken=taken, best=best, regret=regret))
    return found


def winners(rows: Sequence[Row]) -> list[Winner]:
    """By zeros and N, the number of shapes for which each format was the fastest, and how fast the fastest were."""
    cases: dict[tuple[float, int], dict[tuple[int, int], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.system == "flashllm" and row.sparsity is not None and row.speedup is not None:
            cases[row.sparsity, row.N][row.M, row.K].append(row)
    found = []
    for (zeros, n), shapes in sorted(cases.items()):
        best = [min(group, key=measured) for group in shapes.values()]
        fastest = Counter(row.format for row in best).most_common()
        speedups = [row.speedup for row in best if row.speedup is not None]
        formats = tuple(name for name in FORMATS if any(row.format == name for g in shapes.values() for row in g))
        found.append(Winner(zeros=zeros, n=n, measured=formats, fastest=fastest, speedup=geometric_mean(speedups)))
    return found


def crossover(shape: Shape, density: float, name: str, fitted: Model) -> int | None:
    """The least N, in steps of 64 columns, for which the model expands the weight; ``None``: none up to 4096."""
    size = weight_class(name).estimated_bytes(shape, density)
    options = {"m": shape[0], "k": shape[1], "weight_bytes": size, "density": density, "gpu": GPU, "model": fitted}
    wide = range(128, 4097, 64)
    return next((n for n in wide if expand.expected(name, n=n, **options).expand), None)


def best_us(shape: Shape, density: float, n: int, fitted: Model) -> float:
    """Microseconds that the model predicts for the fastest format, with zeros at random places."""
    options = {"m": shape[0], "k": shape[1], "n": n, "density": density, "gpu": GPU, "model": fitted}
    sizes = {name: weight_class(name).estimated_bytes(shape, density) for name in fitted.kernels}
    return min(expand.expected(name, weight_bytes=size, **options).us for name, size in sizes.items())


def ahead_of_dense(fitted: Model, n: int) -> tuple[float | None, int | None]:
    """The least fraction of zeros at which a format is faster than dense for ``WIDE_SHAPE``, in steps of 0.05, and the
    least side of a square matrix with 80 % zeros for which one is, in steps of 256.
    """

    def ahead(shape: Shape, density: float) -> bool:
        return best_us(shape, density, n, fitted) < model.dense_us(*shape, n, gpu=GPU, model=fitted)

    zeros = next((step / 20 for step in range(20) if ahead(WIDE_SHAPE, 1 - step / 20)), None)
    side = next((size for size in range(256, 16385, 256) if ahead((size, size), 0.2)), None)
    return zeros, side


def report(fitted: Model, rows: Sequence[Row]) -> str:
    """Markdown: constants, errors, regrets and who wins."""
    lines = [
        f"{fitted.gpu}; {len(rows)} rows of {len(fitted.files)} files, commits {', '.join(fitted.commits)}.",
        "",
        "| format | columns | start-up, us | cycles per tile | cycles per stored element | sharpness |",
        "|---|---|---|---|---|---|",
    ]
    for name, widths in fitted.kernels.items():
        lines += [
            f"| {name} | {width} | {c.start_us:.2f} | {c.tile_cycles:.0f} | {c.value_cycles:.3f} | {c.sharpness:.1f} |"
            for width, c in widths.items()
        ]
    dense = f"start-up {fitted.dense.start_us:.2f} us, {100 * fitted.dense.read_share:.1f} % of the pure read bandwidth"
    lines += ["", f"Dense (cuBLAS): {dense}.", "", "| | N | rows | mean error | largest |", "|---|---|---|---|---|"]
    lines += [
        f"| {q.name} | {'all' if q.n is None else q.n} | {q.rows} | {100 * q.mean:.1f} % | {100 * q.largest:.1f} % |"
        for q in errors(rows, fitted)
    ]
    lines += ["", "| choice for | cases | the fastest taken | mean regret | largest |", "|---|---|---|---|---|"]
    together = joint_choices(rows, fitted)
    for title, made in (("one N", choices(rows, fitted)), ("N = 8, 16 and 32 together", together)):
        right = sum(choice.taken == choice.best for choice in made)
        regrets = [choice.regret for choice in made]
        lines.append(f"| {title} | {len(made)} | {right} | {100 * fmean(regrets):.2f} % | {100 * max(regrets):.1f} % |")
    lines += ["", "| zeros | N | measured | fastest (shapes) | speed-up over cuBLAS |", "|---|---|---|---|---|"]
    for winner in winners(rows):
        ranked = ", ".join(f"{name} ({count})" for name, count in winner.fastest)
        cells = (
            f"{100 * winner.zeros:g} %",
            str(winner.n),
            ", ".join(winner.measured),
            ranked,
            f"{winner.speedup:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Rows that it was not fitted to:",
        "",
        "| file | | rows | mean error | largest |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {file} | {q.name} | {q.rows} | {100 * q.mean:.1f} % | {100 * q.largest:.1f} % |"
        for file in UNSEEN
        for q in errors(results.read(RESULTS / file), fitted)
        if q.n is None
    ]
    m, k = WIDE_SHAPE
    lines += ["", "Faster than dense, by the model:", ""]
    lines += [f"| N | {m}x{k}, zeros from | square matrices with 80 % zeros, side from |", "|---|---|---|"]
    for n in (8, 16, 32, 64):
        zeros, side = ahead_of_dense(fitted, n)
        lines.append(f"| {n} | {'-' if zeros is None else f'{100 * zeros:.0f} %'} | {'-' if side is None else side} |")
    lines += ["", f"Expanded from N on, by the model, at {m}x{k}:", ""]
    lines += [f"| zeros | {' | '.join(fitted.kernels)} |", f"|---|{'---|' * len(fitted.kernels)}"]
    for zeros in (0.5, 0.7, 0.8, 0.9):
        ns = [crossover(WIDE_SHAPE, 1 - zeros, name, fitted) for name in fitted.kernels]
        lines.append(f"| {100 * zeros:g} % | {' | '.join('-' if n is None else str(n) for n in ns)} |")
    return "\n".join(lines) + "\n"


def write(fitted: Model, rows: Sequence[Row]) -> None:
    """Put the constants into the package and the report into its document."""
    target = REPOSITORY / "src" / "flashllm" / "matmul" / model.DATA_FILE
    target.write_text(json.dumps(model.to_json(fitted), indent=1) + "\n", encoding="utf-8")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(before + BEGIN + report(fitted, rows) + END + after, encoding="utf-8")


@click.command()
@click.option("--write", "writes", is_flag=True, help="Fit anew and replace the model and its page.")
def main(writes: bool) -> None:
    """Report how good the time model is; with --write, fit it anew first."""
    fitted = fit(default_files()) if writes else model.committed()
    rows = read_rows(RESULTS / name for name in fitted.files)
    if writes:
        write(fitted, rows)
    click.echo(report(fitted, rows), nl=False)


if __name__ == "__main__":
    main()
