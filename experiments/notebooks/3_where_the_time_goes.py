# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Where the time goes
#
# The time of a product `y = x Wᵀ` with a packed W has a floor: its bytes at the bandwidth of a pure read. This notebook
# shows how far above it the kernels of all formats are, and what keeps them there: decoding, measured by leaving ideas
# out and counted on the CPU emulator, and the fixed cost of a launch. Times come from the newest rows in
# `experiments/results` or, on a machine with a GPU, from a few cases measured here. Counts always come from the
# emulator.

# %%
import tempfile
from pathlib import Path
from statistics import geometric_mean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import experiments.figures
import flashllm
from experiments.figures import rows, style
from experiments.figures.ablation import IDEAS
from experiments.figures.rows import Case, Final
from experiments.notebooks.shown import show, table
from flashllm import backends
from flashllm.backends import emulator
from flashllm.bench import results
from flashllm.device import device_facts
from flashllm.gpus import find_gpu, gpu_of
from flashllm.matmul import model

EXPERIMENTS = Path(experiments.figures.__file__).parents[1]
LIVE = backends.select(None).name == "cuda"
MARKERS = {"tiled-csl": "s", "bitmap": "o", "slot24": "^"}
ZEROS = tuple(style.ZEROS)


def bench(*options):
    """Rows of ``flashllm bench``, measured here."""
    from flashllm.cli.bench import command

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command.main([*options, "--time-cap", "0.1", "--out", str(file)], standalone_mode=False)
        return [row for row in results.read(file) if row.check == "pass" and row.median_us is not None]


def final(row):
    """A row in the form that ``experiments.figures.rows`` returns."""
    return Final(
        us=row.median_us,
        cublas_us=row.cublas_us,
        format=row.format,
        commit=row.commit or "",
        floor_us=row.bytes / (row.read_gbps * 1e3),
        bytes=row.bytes,
    )


def case_of(row):
    """Shape, N and zeros of a row."""
    return Case(row.M, row.K, row.N, row.sparsity)


if LIVE:
    few = ("--shape", "4096x4096,7168x7168,28672x7168", "--sparsity", "0.5,0.6,0.7,0.8,0.9", "--n", "8,32,64")
    measured = bench(*few, "--format", ",".join(MARKERS))
    newest = {}
    for row in measured:
        if row.system == "flashllm":
            newest.setdefault((row.gpu, row.format), {})[case_of(row)] = final(row)
    gpus = (measured[0].gpu,)
else:
    newest = rows.newest_of_all(EXPERIMENTS)
    gpus = rows.in_order(gpu for gpu, name in newest if name in MARKERS)
for gpu in gpus:
    print(gpu, {name: len(newest.get((gpu, name), ())) for name in MARKERS}, "cases")

# %% [markdown]
# ## Bytes against time
#
# This is a roofline with time on both axes. The horizontal axis is the time for reading W and x and writing y at the
# read bandwidth that the same run measured. The vertical axis is the time of the product.

# %%
BATCHES = (8, 32, 64)


def dense_floor(case, row):
    """Microseconds that the bytes of the dense product take at the bandwidth of the row's run."""
    return 2 * (case.M * case.K + case.N * (case.M + case.K)) * row.floor_us / row.bytes


with style.applied():
    figure = Figure(figsize=(10, 3.3 * len(gpus) + 0.7), layout="constrained")
    grid = figure.subplots(len(gpus), len(BATCHES), sharex=True, sharey=True, squeeze=False)
    for line, gpu in zip(grid, gpus, strict=True):
        for axes, n in zip(line, BATCHES, strict=True):
            axes.plot((2, 600), (2, 600), color=style.INK, linewidth=0.9)
            for name, marker in MARKERS.items():
                cases = {case: row for case, row in newest.get((gpu, name), {}).items() if n == case.N}
                dense = [(dense_floor(case, row), row.cublas_us) for case, row in cases.items()]
                axes.plot(*zip(*dense, strict=True), "D", color="#b5b5b5", markersize=3, zorder=1)
                for zeros, color in style.ZEROS.items():
                    points = [(row.floor_us, row.us) for case, row in cases.items() if case.zeros == zeros]
                    if points:
                        axes.plot(*zip(*points, strict=True), marker, color=color, mfc="none", markersize=4)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks((5, 10, 20, 50, 100, 200, 500), (5, 10, 20, 50, 100, 200, 500))
            axes.set_yticks((5, 10, 20, 50, 100, 200, 500), (5, 10, 20, 50, 100, 200, 500))
            axes.minorticks_off()
            axes.set_xlim(3, 600)
            axes.set_ylim(5, 600)
            axes.grid(visible=True, axis="both")
            axes.set_title(f"{gpu}, N = {n}", fontsize=8)
        line[0].set_ylabel("time, us")
    for axes in grid[-1]:
        axes.set_xlabel("bytes at the read bandwidth, us")
    handles = [Patch(color=color, label=f"{100 * zeros:g} % zeros") for zeros, color in style.ZEROS.items()]
    for name, marker in MARKERS.items():
        handles.append(Line2D([], [], color=style.INK, marker=marker, mfc="none", linestyle="none", label=name))
    handles.append(Line2D([], [], color="#b5b5b5", marker="D", markersize=4, linestyle="none", label="cuBLAS"))
    figure.legend(handles=handles, loc="outside upper left", ncols=9, fontsize=7)
    show(figure)

# %% [markdown]
# On the diagonal memory alone determines the time. cuBLAS is close to it. Packed weights move to the left, since they
# have fewer bytes, but not down by as much: the more zeros and the more columns of x, the further they are above the
# diagonal. In numbers, the time divided by the time of the bytes, as geometric means over the shapes:

# %%
lines = []
for gpu in gpus:
    for name in MARKERS:
        for n in BATCHES:
            cases = {case: row for case, row in newest.get((gpu, name), {}).items() if n == case.N}
            means = []
            for zeros in ZEROS:
                found = [row.us / row.floor_us for case, row in cases.items() if case.zeros == zeros]
                means.append(f"{geometric_mean(found):.2f}" if found else "")
            lines.append([gpu, name, n, *means])
table(["GPU", "format", "N", *(f"{100 * zeros:g} %" for zeros in ZEROS)], lines)

# %% [markdown]
# ## Leaving ideas out
#
# The Tiled-CSL kernel is measured without one of its ideas at a time: words in row order instead of bank order;
# loading, scattering and multiplying one after the other instead of overlapped; clearing whole tiles instead of only
# what was written.

# %%
if LIVE:
    extra = bench("--shape", "7168x7168,28672x7168", "--n", "16", "--sparsity", "0.7,0.8,0.9", "--ablation")
    ablation = {gpus[0]: {}}
    for row in extra:
        if row.system in ("flashllm", "flashllm-ablation"):
            idea = row.kernel.partition(":")[0] if row.system == "flashllm-ablation" else ""
            ablation[gpus[0]].setdefault(idea, {})[case_of(row)] = row.median_us
else:
    ablation = rows.ablation(EXPERIMENTS)

with style.applied():
    figure = Figure(figsize=(9.5, 3.0), layout="constrained")
    panels = figure.subplots(1, len(ablation), sharey=True, squeeze=False)[0]
    for axes, (gpu, times) in zip(panels, ablation.items(), strict=True):
        levels = sorted({case.zeros for case in times[""]})
        for i, zeros in enumerate(levels):
            for j, idea in enumerate(IDEAS):
                found = [us / times[""][case] for case, us in times[idea].items() if case.zeros == zeros]
                more = geometric_mean(found)
                place = j + 0.26 * (i - 1)
                axes.bar(place, more - 1, 0.24, bottom=1, color=style.ZEROS[zeros])
                axes.text(place, max(more, 1) + 0.004, f"{more:.2f}", ha="center", va="bottom", fontsize=6.5)
        axes.axhline(1, color=style.INK, linewidth=0.9)
        axes.set_xticks(range(len(IDEAS)), ("words in row order", "one after the other", "whole tiles cleared"))
        axes.set_title(f"{gpu}, N = {', '.join(str(n) for n in sorted({case.N for case in times['']}))}")
    panels[0].set_ylabel("time / with all ideas")
    panels[0].margins(y=0.08)
    handles = [Patch(color=style.ZEROS[zeros], label=f"{100 * zeros:g} % zeros") for zeros in levels]
    panels[0].legend(handles=handles, loc="upper right", fontsize=7.5)
    show(figure)

# %% [markdown]
# Bars are the time without the idea divided by the time with all ideas, as geometric means over the shapes: above one
# the idea pays off. The rows come from the builds that they name, and a current build may differ.
# `2_tiled_csl_by_hand` shows why the order matters.
#
# ## What a tile costs
#
# The emulator runs the kernels' own source and counts what it does. For every 128 x 64 elements of W, at N = 16:

# %%
M, K, N = 1024, 1024, 16
TILES = M // 128 * (K // 64)
random = np.random.default_rng(3)
full = random.standard_normal((M, K))
x = random.standard_normal((N, K)).astype(np.float16)
pruned = {z: np.where(np.abs(full) < np.quantile(np.abs(full), z), 0, full).astype(np.float16) for z in ZEROS}

counted, bank_order, row_order, lines = {}, {}, {}, []
for name in MARKERS:
    for zeros in ZEROS:
        w = flashllm.pack(pruned[zeros], format=name)
        y, counts = emulator.spmm(x, w, sm_count=1)
        counted[name, zeros] = w.nbytes / TILES
        if name == "tiled-csl":
            bank_order[zeros] = counts
            _, row_order[zeros] = emulator.spmm(x, flashllm.TiledCSL.from_dense(pruned[zeros], order="row"), sm_count=1)
        if zeros in (0.5, 0.8, 0.9):
            useful = w.nnz * N
            lines.append(
                [
                    name,
                    f"{100 * zeros:g} %",
                    f"{w.nbytes / TILES:,.0f}",
                    f"{sum(counts.mma.values()) / TILES:.0f} {', '.join(counts.mma)}",
                    f"{counts.multiply_adds / useful:.1f}",
                    f"{counts.scatter.wavefronts / TILES:.0f}",
                    f"{counts.ldmatrix.wavefronts / TILES:.0f}",
                ]
            )
head = ["format", "zeros", "bytes of W", "tensor-core instructions", "multiply-adds / useful ones"]
table([*head, "wavefronts of 2-byte stores", "of ldmatrix"], lines)

# %% [markdown]
# A wavefront is one pass through shared memory. Multiply-adds with pruned zeros are wasted, but tensor cores have them
# to spare at this N; slot24, on the sparse tensor cores, wastes fewer where its columns pair up. Tiled-CSL stores every
# value into a dense tile, later stores a zero over it, and reads the tile back with `ldmatrix`. bitmap and slot24
# decode into registers; none of the counters sees their loads of masks and values, so the emulator says nothing about
# the cost of these loads.
#
# The counters do see what Tiled-CSL does in shared memory, so it can be compared with DRAM: a multiprocessor moves one
# wavefront per cycle, and gets its share of the bandwidth.

# %%
PARTS = {
    "words through the L1": "#b5b5b5",
    "2-byte stores, without conflicts": "#56b4e9",
    "their conflicts": "#0072b2",
    "16-byte stores": "#009e73",
    "ldmatrix": "#e69f00",
}
dram = {
    name: {
        zeros: counted["tiled-csl", zeros] / (gpu.read_gbps / gpu.sm_count) * gpu.clock_mhz * 1e-3 for zeros in ZEROS
    }
    for name in ("H100 80GB", "H200")
    for gpu in [find_gpu(name)]
}


def wavefronts(counts, zeros):
    """Wavefronts of a tile, in the order of ``PARTS``; 128 bytes of words are one."""
    scatter = counts.scatter
    parts = (scatter.ideal, scatter.conflicts, counts.store16.wavefronts, counts.ldmatrix.wavefronts)
    return (counted["tiled-csl", zeros] / 128, *(part / TILES for part in parts))


with style.applied():
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, zeros in enumerate(ZEROS):
        for shift, counts in ((-0.2, bank_order[zeros]), (0.2, row_order[zeros])):
            bottom = 0
            for part, color in zip(wavefronts(counts, zeros), PARTS.values(), strict=True):
                axes.bar(place + shift, part, 0.36, bottom=bottom, color=color)
                bottom += part
            axes.text(place + shift, 6, "bank" if shift < 0 else "row", ha="center", fontsize=6.5)
    for (name, cycles), dash in zip(dram.items(), ("-", "--"), strict=True):
        axes.plot(range(len(ZEROS)), cycles.values(), dash, color=style.INK, marker="o", markersize=4, label=name)
    axes.set_xticks(range(len(ZEROS)), [f"{100 * zeros:g} %" for zeros in ZEROS])
    axes.set_xlabel("zeros")
    axes.set_ylabel("cycles of a multiprocessor for a tile")
    handles = [Patch(color=color, label=label) for label, color in PARTS.items()]
    lines = [Line2D([], [], color=style.INK, linestyle=d, marker="o", markersize=4) for d in ("-", "--")]
    labels = [handle.get_label() for handle in handles] + [f"DRAM, {name}" for name in dram]
    axes.legend(handles + lines, labels, loc="upper right", fontsize=7.5, handlelength=3)
    show(figure)

# %% [markdown]
# The stacked bars are the wavefronts of a tile in bank order and in row order. The lines are the cycles in which DRAM
# delivers the bytes of the tile to one of the multiprocessors. By these counts reading determines the time where a bar
# is below the line; where it is above, the way through shared memory does, and fewer bytes no longer help. With more
# bandwidth the line is lower. In measurements the change comes sooner, since neither side runs without gaps
# (`docs/kernels/tiled_csl.md`).
#
# ## The fixed cost of a launch
#
# A launch takes time before the first bytes arrive and after the last products are done. Below are the measured rows of
# all shapes at 80 % zeros and N = 8, and the time model (`docs/auto.md`) down to small square matrices.

# %%
FORMAT_COLORS = {"tiled-csl": "#0072b2", "bitmap": "#009e73", "slot24": "#d55e00"}
gpu = gpus[-1]
modelled = find_gpu("H200")
if LIVE:
    modelled = gpu_of(device_facts())
sides = np.geomspace(512, 24576, 40)


def predicted(name, side):
    """The model's prediction for a square matrix at 80 % zeros, N = 8."""
    side = int(side) // 64 * 64
    nbytes = flashllm.registry.weight_class(name).estimated_bytes((side, side), 0.2)
    return model.predict(name, m=side, k=side, n=8, weight_bytes=nbytes, density=0.2, gpu=modelled)


def line_through(floors, times):
    """Slope and intercept of the line that minimises the squares of the relative errors."""
    return np.polyfit(floors, times, 1, w=1 / np.array(times))


lines = []
with style.applied():
    figure = Figure(figsize=(9.5, 3.5), layout="constrained")
    times, shares = figure.subplots(1, 2)
    for name, color in FORMAT_COLORS.items():
        found = [predicted(name, side) for side in sides]
        times.plot(sides**2 / 1e6, [one.us for one in found], color=color, label=name)
        shares.plot(sides**2 / 1e6, [one.start_us / one.us for one in found], color=color, label=name)
        cases = {case: row for case, row in newest[gpu, name].items() if (case.N, case.zeros) == (8, 0.8)}
        points = [(case.M * case.K / 1e6, row.us) for case, row in cases.items()]
        times.plot(*zip(*points, strict=True), MARKERS[name], color=color, markersize=4.5, mfc="none")
        slope, start = line_through([row.floor_us for row in cases.values()], [row.us for row in cases.values()])
        lines.append([name, f"{found[0].start_us:.2f}", f"{start:.2f}", f"{slope:.2f}"])
    dense = [model.dense_us(int(side), int(side), 8, gpu=modelled) for side in sides]
    times.plot(sides**2 / 1e6, dense, color=style.QUIET, label="cuBLAS")
    shares.plot(sides**2 / 1e6, model.committed().dense.start_us / np.array(dense), color=style.QUIET, label="cuBLAS")
    cases = {case: row for case, row in newest[gpu, "bitmap"].items() if (case.N, case.zeros) == (8, 0.8)}
    points = [(case.M * case.K / 1e6, row.cublas_us) for case, row in cases.items()]
    times.plot(*zip(*points, strict=True), "D", color=style.QUIET, markersize=4, mfc="none")
    floors, whole = zip(*((dense_floor(case, row), row.cublas_us) for case, row in cases.items()), strict=True)
    slope, start = line_through(floors, whole)
    lines.append(["cuBLAS", f"{model.committed().dense.start_us:.2f}", f"{start:.2f}", f"{slope:.2f}"])
    for axes in (times, shares):
        axes.set_xscale("log")
        axes.set_xticks((0.3, 1, 3, 10, 30, 100, 300), (0.3, 1, 3, 10, 30, 100, 300))
        axes.minorticks_off()
        axes.set_xlabel("elements of W, million")
    times.set_yscale("log")
    times.set_yticks((5, 10, 20, 50, 100, 200), (5, 10, 20, 50, 100, 200))
    times.minorticks_off()
    times.set_ylabel("us")
    times.set_title(gpu)
    shares.set_ylim(0, 1)
    shares.set_ylabel("start-up / time")
    shares.set_title("share of the fixed cost, by the model")
    times.legend(loc="upper left", fontsize=7.5)
    show(figure)
table(["", "start-up of the model, us", "intercept of the rows, us", "slope"], lines)

# %% [markdown]
# Lines are the model; points are measured. Towards the left all lines become flat: a small matrix takes about as long
# as the start-up, which is longer for the kernels here than for cuBLAS, so packing does not pay off there. The table
# has the model's start-up, and the intercept and slope of a straight line of the time against the time of the bytes,
# fitted to the measured points by relative errors. Part of the fixed cost can be hidden behind the previous launch
# (`docs/kernels/pdl.md`). The newest rows that show this:

# %%
if LIVE and device_facts().cc >= (9, 0):
    pairs = bench("--shape", "7168x7168,28672x7168", "--n", "8", "--sparsity", "0.5,0.8", "--pdl")
else:
    pairs = results.read(sorted((EXPERIMENTS / "results").glob("*-pdl.jsonl"))[-1])
ordinary = {(case_of(row), row.format): row.median_us for row in pairs if row.system == "flashllm"}
lines = []
for row in pairs:
    if row.system == "flashllm-pdl" and row.N == 8:
        before = ordinary[case_of(row), row.format]
        gain = f"{before - row.median_us:.1f}"
        lines.append(
            [row.gpu, f"{row.M}x{row.K}", f"{100 * row.sparsity:g} %", row.format, before, row.median_us, gain]
        )
table(["GPU", "MxK", "zeros", "format", "launched one by one, us", "overlapping, us", "saved, us"], lines)
