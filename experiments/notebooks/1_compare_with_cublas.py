# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Compare with cuBLAS
#
# While a language model decodes, a few activations `x [N, K]` are multiplied by large weights `W [M, K]`: `y = x Wᵀ`.
# N is the batch size, and reading W dominates the time. If W has been pruned without structure, most of what is read is
# zeros. flashllm keeps W compressed in GPU memory, expands it on chip, tile by tile, and multiplies the tiles on the
# tensor cores.
#
# This notebook packs a weight, checks a product against NumPy, and compares times with cuBLAS and other systems. On a
# machine with a GPU it measures a few cases here. Elsewhere it takes the newest rows in `experiments/results`, and
# products run on the CPU emulator, which executes the GPU's kernels compiled for the CPU.

# %%
import tempfile
from pathlib import Path
from statistics import geometric_mean

import numpy as np
from matplotlib.figure import Figure

import experiments.figures
import flashllm
from experiments.figures import rows, style
from experiments.figures.rows import Case, Compared, Final
from experiments.notebooks.shown import show, table
from flashllm import backends
from flashllm.bench import check, results
from flashllm.device import device_facts
from flashllm.gpus import find_gpu, gpu_of
from flashllm.matmul import auto

EXPERIMENTS = Path(experiments.figures.__file__).parents[1]
BACKEND = backends.select(None).name
LIVE = BACKEND == "cuda"
BATCHES = (8, 16, 32, 64)

print("products run on:", BACKEND)

# %% [markdown]
# ## One product
#
# `pack` chooses the format that suits the matrix and N; `spmm` multiplies. The error is given in units of the bound
# that flashllm promises for every element, which covers the rounding of y and of the fp32 sums.

# %%
random = np.random.default_rng(0)
W = random.standard_normal((512, 1024)).astype(np.float32)
W[np.abs(W) < np.quantile(np.abs(W), 0.8)] = 0  # magnitude pruning
W = W.astype(np.float16)
x = random.standard_normal((16, 1024)).astype(np.float16)

w = flashllm.pack(W, n=16)
if LIVE:
    import cupy

    y = cupy.asnumpy(flashllm.spmm(cupy.asarray(x), w.to_device()))
else:
    y = flashllm.spmm(x, w, backend=BACKEND)

reference = check.make_reference(x.astype(float), W.astype(float), np.arange(512), "fp16")
print(f"zeros      {w.sparsity:.1%}")
print(f"format     {w.format}")
print(f"bytes      {w.nbytes:,}, dense {W.nbytes:,}: {W.nbytes / w.nbytes:.2f} times as many")
print(f"max |y - NumPy|       {np.abs(y - reference.values).max():.2e}")
print(f"max error over bound  {check.error_over_bound(y.astype(float), reference):.3f}")

# %% [markdown]
# ## Speed-up over zeros
#
# The time of one launch of the fastest of cuBLAS's and cublasLt's algorithms and layouts is divided by that of one
# launch of the packed weight, in the format that `auto` takes, in the same run: fp16, zeros at random places, CUDA
# graphs, weights not in the L2 cache (`docs/measurement.md`).


# %%
def bench(*options):
    """Rows of ``flashllm bench``, measured here."""
    from flashllm.cli.bench import command

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        command.main([*options, "--time-cap", "0.1", "--out", str(file)], standalone_mode=False)
        return results.read(file)


def by_system(measured):
    """Rows in the form that the functions of ``experiments.figures.rows`` return."""
    found = {}
    for row in measured:
        if row.median_us is None or row.cublas_us is None or row.sparsity is None or row.check != "pass":
            continue
        found.setdefault(row.system, {})[Case(row.M, row.K, row.N, row.sparsity)] = Final(
            us=row.median_us,
            cublas_us=row.cublas_us,
            format=row.format,
            commit=row.commit or "",
            floor_us=row.bytes / (row.read_gbps * 1e3),
            bytes=row.bytes,
        )
    return found


if LIVE:
    few = ("--shape", "7168x7168,28672x7168", "--sparsity", "0.5,0.6,0.7,0.8,0.9", "--n", "8,16,32,64")
    measured = bench(*few, "--systems", "all")
    gpu = measured[0].gpu
    compared = (Compared(gpu=gpu, commits=(), systems=by_system(measured)),)
    chosen = {gpu: compared[0].systems["flashllm"]}
else:
    compared = rows.compared(EXPERIMENTS)
    chosen = rows.chosen(EXPERIMENTS)
for gpu, cases in chosen.items():
    print(f"{gpu}: {len(cases)} cases, {len({case[:2] for case in cases})} shapes")

# %%
SHADES = {8: "#0072b2", 16: "#009e73", 32: "#e69f00", 64: "#d55e00"}  # of N


def speedups(cases, n, zeros):
    """The speed-ups of all shapes."""
    return [row.speedup for case, row in cases.items() if (case.N, case.zeros) == (n, zeros)]


with style.applied():
    figure = Figure(figsize=(4.6 * len(chosen) + 0.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, (gpu, cases) in zip(panels, chosen.items(), strict=True):
        zeros = sorted({case.zeros for case in cases})
        for n, color in SHADES.items():
            found = [speedups(cases, n, z) for z in zeros]
            axes.fill_between(zeros, list(map(min, found)), list(map(max, found)), color=color, alpha=0.12, linewidth=0)
            axes.plot(zeros, list(map(geometric_mean, found)), color=color, marker="o", markersize=4, label=f"N = {n}")
        axes.axhline(1, color=style.QUIET, linewidth=1)
        axes.text(0.9, 0.97, "cuBLAS", color=style.QUIET, fontsize=7, va="top", ha="right")
        axes.set_xticks(zeros, [f"{100 * z:g} %" for z in zeros])
        axes.set_xlabel("zeros")
        axes.set_title(gpu)
    panels[0].set_ylabel("speed-up over cuBLAS")
    panels[0].legend(loc="upper left", fontsize=7.5)
    show(figure)

# %% [markdown]
# Lines are geometric means over the shapes; shaded bands reach from the slowest to the fastest shape. The gain grows
# with the fraction of zeros, since fewer bytes are read, and falls with N, since every expanded tile is multiplied by
# more columns. On a GPU with more bandwidth for the same multiprocessors, expanding takes a larger part of the time,
# and the gain is smaller.
#
# ## All systems side by side
#
# All systems are measured side by side, and each is compared with cuBLAS of the same run. `docs/baselines.md` says
# what each one is and whose code is measured.

# %%
SPARSE = ("flashllm", "tca-bme", "sparta", "sparta-cusparselt", "sputnik", "cusparse")
OTHERS = ("torch-int4", "torch-fp8", "mma-2:4", "cusparselt-2:4", "cublas-notc")  # other matrices, or zeros unused
ZEROS = tuple(style.ZEROS)


def mean(one, system, n, zeros=None):
    """Geometric mean of the speed-ups of a system; NaN if it was not measured."""
    cases = one.systems.get(system, {})
    found = [row.speedup for case, row in cases.items() if n == case.N and zeros in (None, case.zeros)]
    return geometric_mean(found) if found else float("nan")


with style.applied():
    for one in compared:
        figure = Figure(figsize=(10.5, 3.7), layout="constrained")
        panels = figure.subplots(1, len(BATCHES), sharey=True)
        for axes, n in zip(panels, BATCHES, strict=True):
            for name in SPARSE:
                label, color, marker = style.SYSTEMS[name]
                line = [mean(one, name, n, z) for z in ZEROS]
                axes.plot(ZEROS, line, color=color, marker=marker, markersize=4.5, label=label)
            for place, name in enumerate(OTHERS):
                label, color, marker = style.SYSTEMS[name]
                size = {"markersize": 6, "linestyle": "none", "mfc": "none", "label": label}
                axes.plot([0.955 + 0.022 * place], [mean(one, name, n)], color=color, marker=marker, **size)
            axes.axvline(0.932, color=style.RULE, linewidth=0.8)
            axes.axhline(1, color=style.QUIET, linewidth=1)
            axes.set_yscale("log")
            axes.set_yticks((0.1, 0.2, 0.5, 1, 2, 3), ("0.1", "0.2", "0.5", "1", "2", "3"))
            axes.minorticks_off()
            axes.set_xticks(ZEROS, [f"{100 * z:g} %" for z in ZEROS])
            axes.set_title(f"N = {n}")
        panels[0].set_ylabel(f"{one.gpu}\nspeed-up over cuBLAS")
        figure.supxlabel("zeros; right of the line, systems that do not use them", fontsize=8)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, fontsize=7.5)
        show(figure)

# %% [markdown]
# Left of the vertical line are systems for unstructured zeros. Right of it are rivals that trade accuracy differently
# (2:4 keeps two of every four weights, fp8 and int4 are dense matrices of fewer bits), and cuBLAS without tensor cores.
# The horizontal grey line is cuBLAS. The same numbers as a table:

# %%
for one in compared:
    lines = []
    for n in BATCHES:
        for name in (*SPARSE, *OTHERS):
            if name in one.systems and any(n == case.N for case in one.systems[name]):
                means = [mean(one, name, n, z) for z in ZEROS] if name in SPARSE else [mean(one, name, n)]
                texts = [f"{value:.2f}" for value in means] + [""] * (len(ZEROS) - len(means))
                lines.append([n, style.SYSTEMS[name][0], *texts])
    print(f"{one.gpu}: speed-up over cuBLAS; in the first column for systems that do not use the zeros")
    table(["N", "system", *(f"{100 * z:g} %" for z in ZEROS)], lines)

# %% [markdown]
# ## Where it loses
#
# **Wide x and few zeros.** Each entry gives the geometric mean over the shapes, and for how many of them flashllm is
# slower than cuBLAS.

# %%
for gpu, cases in chosen.items():
    lines = []
    for n in BATCHES:
        found = [speedups(cases, n, z) for z in ZEROS]
        slower = [f"{sum(s < 1 for s in shapes)} of {len(shapes)}" for shapes in found]
        lines.append([n, *(f"{geometric_mean(s):.2f}, {k} slower" for s, k in zip(found, slower, strict=True))])
    print(gpu)
    table(["N", *(f"{100 * z:g} %" for z in ZEROS)], lines)

# %% [markdown]
# **Fewer bits.** A dense fp8 matrix is a rival wherever its accuracy is sufficient. The table gives the fraction of
# zeros from which flashllm is faster than each 2:4, fp8 or int4 system, by the means above:

# %%
for one in compared:
    lines, rivals = [], [name for name in OTHERS[:-1] if name in one.systems]
    for n in BATCHES:
        line = [n]
        for name in rivals:
            ahead = [z for z in ZEROS if mean(one, "flashllm", n, z) > mean(one, name, n)]
            line.append(f"{100 * ahead[0]:g} %" if ahead else f"not up to {100 * ZEROS[-1]:g} %")
        lines.append(line)
    print(one.gpu)
    table(["N", *(style.SYSTEMS[name][0] for name in rivals)], lines)

# %% [markdown]
# **Small matrices.** A launch has a fixed cost, which a small matrix does not recover. The points are measured: square
# matrices on this GPU or, without one, the newest rows of a layer of SmolLM2-135M. The lines are the predictions of the
# time model (`docs/auto.md`) for square matrices with the same fraction of zeros, in the format that it would take.

# %%
if LIVE:
    small = bench("--shape", "1024x1024,2048x2048,4096x4096,8192x8192", "--sparsity", "0.8", "--n", "8,16,32,64")
    modelled = gpu_of(device_facts())
else:
    small = results.read(sorted((EXPERIMENTS / "results").glob("*-smollm2-ffn-down.jsonl"))[-1])
    modelled = find_gpu("H100 80GB")
small = [row for row in small if row.system == "flashllm"]

sides = np.unique(np.geomspace(512, 16384, 31).astype(int) // 64 * 64)
with style.applied():
    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for n, color in SHADES.items():
        ranked = [auto.rank_formats((int(side), int(side)), 0.2, n, gpu=modelled) for side in sides]
        over = [ranking.dense.us[n] / ranking.best.us[n] for ranking in ranked]
        axes.plot(sides, over, color=color, label=f"N = {n}, model")
        points = [(np.sqrt(row.M * row.K), row.speedup) for row in small if n == row.N]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, linestyle="none")
    axes.plot([], [], color=style.INK, marker="o", markersize=5, linestyle="none", label="measured")
    axes.axhline(1, color=style.QUIET, linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = [512 * 2**k for k in range(6)]
    axes.set_xticks(ticks, ticks)
    axes.set_xlabel("square root of M K")
    axes.set_ylabel("speed-up over cuBLAS")
    axes.set_title(f"80 % zeros, {modelled.name}")
    axes.legend(loc="upper left", fontsize=7.5)
    show(figure)
lines = [[f"{row.M}x{row.K}", row.N, row.format, row.median_us, row.cublas_us, f"{row.speedup:.2f}"] for row in small]
table(["MxK", "N", "format", "flashllm, us", "cuBLAS, us", "speed-up"], lines)

# %% [markdown]
# **Very many zeros.** Formats that store something for every tile, or for every element, stop shrinking; a format that
# stores an index for every value does not. One shape, up to a fraction of zeros that leaves hardly any values:

# %%
if LIVE:
    M, K, N = 7168, 7168, 16
    sweep = ("--shape", f"{M}x{K}", "--n", str(N), "--sparsity", "0.6,0.7,0.8,0.9,0.95,0.98,0.99", "--systems", "all")
    sweeps = (Compared(gpu=measured[0].gpu, commits=(), systems=by_system(bench(*sweep))),)
else:
    M, K, N = 36864, 9216, 16
    sweeps = rows.compared(EXPERIMENTS, "zeros-systems")
lines = []
with style.applied():
    figure = Figure(figsize=(6.6, 3.8), layout="constrained")
    axes = figure.subplots(1, len(sweeps), sharey=True, squeeze=False)[0]
    for panel, one in zip(axes, sweeps, strict=True):
        levels = sorted({case.zeros for case in one.systems["flashllm"] if case[:3] == (M, K, N) and case.zeros >= 0.6})
        times = {}
        for name in ("cusparse", "sputnik", "sparta", "tca-bme", "cublas", "flashllm"):
            label, color, marker = style.SYSTEMS[name]
            found = {case.zeros: row for case, row in one.systems.get(name, {}).items() if case[:3] == (M, K, N)}
            times[name] = {zeros: found[zeros].us for zeros in levels if zeros in found}
            places = [levels.index(zeros) for zeros in times[name]]
            panel.plot(places, times[name].values(), color=color, marker=marker, markersize=4.5, label=label)
        panel.set_xticks(range(len(levels)), [f"{100 * zeros:g} %" for zeros in levels])
        panel.set_yscale("log")
        panel.set_yticks((20, 50, 100, 200, 500, 1000), (20, 50, 100, 200, 500, 1000))
        panel.minorticks_off()
        panel.set_xlabel("zeros")
        panel.set_title(f"{one.gpu}, {M}x{K}, N = {N}")
        for zeros, us in times["flashllm"].items():
            best = min(times, key=lambda name: times[name].get(zeros, np.inf))
            lines.append(
                [one.gpu, f"{100 * zeros:g} %", f"{us:.1f}", style.SYSTEMS[best][0], f"{times[best][zeros]:.1f}"]
            )
    axes[0].set_ylabel("us")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7.5)
    show(figure)
table(["GPU", "zeros", "flashllm, us", "fastest", "its us"], lines)

# %% [markdown]
# The table names the fastest system for each fraction of zeros. Where it is not flashllm, so few multiplications are
# left that a kernel without tensor cores finishes sooner: matrices pruned that far are sparse in the classical sense.
