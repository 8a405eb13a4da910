# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Your own matrix
#
# From a file to a packed weight: read a matrix, look at its zeros, pack it in every format, see which one `auto` takes
# and why, check a product, save and load. The matrix is generated here, low-rank plus noise and pruned by magnitude; to
# use another one, set `FILE` to a `.npy` file, a `.npz` file of SciPy or a `.safetensors` file. No GPU is needed; if
# there is one, the product runs on it.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import scipy.sparse
from matplotlib.figure import Figure

import flashllm
from experiments.figures import style
from experiments.notebooks.shown import show, table
from flashllm import backends, inspection
from flashllm.bench import check
from flashllm.bench.sources import FileSource
from flashllm.gpus import facts_of, find_gpu
from flashllm.io.container import load_weight
from flashllm.io.matrices import read_matrix
from flashllm.io.safetensors_file import read_header
from flashllm.matmul import auto, model, sample

FILE, TENSOR = None, None  # your file, and the name of the tensor if it is a .safetensors with several
SCRATCH = tempfile.TemporaryDirectory()  # removed when the notebook's kernel ends
FOLDER = Path(SCRATCH.name)
BACKEND = backends.select(None).name
FORMAT_COLORS = {"tiled-csl": "#0072b2", "bitmap": "#009e73", "slot24": "#d55e00"}
GPUS = {name: find_gpu(name) for name in ("H100 80GB", "H200")}

# %% [markdown]
# ## A matrix, in three kinds of files
#
# The matrix is low rank plus noise, as weights often are, with rows of different scale. Pruning keeps the largest
# elements of the whole matrix.

# %%
random = np.random.default_rng(11)
M, K, RANK = 1024, 2048, 16
low_rank = random.standard_normal((M, RANK)) @ random.standard_normal((RANK, K)) / np.sqrt(RANK)
dense = (low_rank + 0.5 * random.standard_normal((M, K))) * np.exp(0.3 * random.standard_normal((M, 1)))
dense = (0.02 * dense).astype(np.float32)


def prune(a, zeros):
    """``a`` with its elements of smallest magnitude set to zero."""
    return np.where(np.abs(a) < np.quantile(np.abs(a), zeros), 0, a)


made = prune(dense, 0.75)
np.save(FOLDER / "layer.npy", made)
scipy.sparse.save_npz(FOLDER / "layer.npz", scipy.sparse.csr_array(made))
safetensors.numpy.save_file({"layer": made, "bias": made[:, 0].copy()}, FOLDER / "model.safetensors")

lines = []
for name, tensor in (("layer.npy", None), ("layer.npz", None), ("model.safetensors", "layer")):
    read = read_matrix(FOLDER / name, tensor)
    same = np.array_equal(read.toarray() if scipy.sparse.issparse(read) else read, made)
    lines.append([name, tensor or "", type(read).__name__, read.dtype, "x".join(map(str, read.shape)), same])
table(["file", "tensor", "read as", "type", "shape", "the same values"], lines)

# %% [markdown]
# `read_matrix` returns what the file holds. `FileSource`, which `flashllm bench --weights FILE` uses, also rounds it to
# fp16 or bf16, rejects NaN and infinities, and counts the values that rounding changed.

# %%
source = FileSource(Path(FILE) if FILE else FOLDER / "layer.npz", TENSOR, "fp16")
W = source.dense(None, None, device=False)  # NumPy, fp16
rounding = source.rounding.report()
print(f"{source.name}: {W.shape[0]}x{W.shape[1]} {W.dtype}, {1 - source.density(None):.2%} zeros")
print(f"rounded to fp16: {rounding.changed:,} of {rounding.total:,} changed, {rounding.became_zero:,} became zero")

# %% [markdown]
# ## Where its zeros are

# %%
stored = W != 0
tiles = np.pad(stored, ((0, -W.shape[0] % 128), (0, -W.shape[1] % 64)))
tiles = tiles.reshape(tiles.shape[0] // 128, 128, -1, 64).mean(axis=(1, 3))
with style.applied():
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    mask, fill, by_row = figure.subplots(1, 3, width_ratios=(1, 1.25, 1))
    mask.imshow(stored[:128, :128], cmap="Greys", interpolation="nearest")
    mask.set_title("first 128 x 128 elements")
    picture = fill.imshow(tiles, cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=fill, label="share stored")
    fill.set_title("tiles of 128 x 64")
    by_row.hist(stored.mean(axis=1), bins=40, color="#0072b2")
    by_row.set_xlabel("share stored")
    by_row.set_ylabel("rows")
    by_row.set_title("rows")
    for axes in (mask, fill):
        axes.grid(visible=False)
    show(figure)

# %% [markdown]
# Left: stored elements in black. Middle: how full each tile is. Right: how many rows keep which share of their
# elements. Pruning over the whole matrix leaves rows uneven, and each format copes with unevenness in its own way.
#
# ## Every format
#
# Tiled-CSL takes four bytes for each stored element. bitmap takes one bit for every element and two bytes for each
# stored one. slot24 lets two columns share a slot if no row has an element in both, and keeps a bit for every slot.

# %%
packed = {name: flashllm.pack(W, format=name) for name in FORMAT_COLORS}
csr = scipy.sparse.csr_array(W.astype(np.float32))
lines = [["dense fp16", f"{W.nbytes:,}", "2.000", "", ""]]
for name, w in packed.items():
    w.validate()
    assert np.array_equal(w.to_dense(), W)
    arrays = ", ".join(f"{buffer} {array.nbytes:,}" for buffer, array in w.arrays().items())
    lines.append([name, f"{w.nbytes:,}", f"{w.bytes_per_element:.3f}", f"{w.nbytes / W.nbytes:.1%}", arrays])
csr_bytes = 2 * csr.nnz + csr.indices.nbytes + csr.indptr.nbytes
lines.append(["CSR, 32-bit indices", f"{csr_bytes:,}", f"{csr_bytes / W.size:.3f}", f"{csr_bytes / W.nbytes:.1%}", ""])
table(["format", "bytes", "per element", "of dense", "buffers"], lines)

# %%
levels = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
sizes = {name: [] for name in FORMAT_COLORS}
for zeros in levels:
    pruned = prune(dense[:512], zeros).astype(np.float16)
    for name in FORMAT_COLORS:
        sizes[name].append(flashllm.pack(pruned, format=name).bytes_per_element)

with style.applied():
    figure = Figure(figsize=(5.8, 3.3), layout="constrained")
    axes = figure.subplots()
    for name, color in FORMAT_COLORS.items():
        axes.plot(levels, sizes[name], color=color, marker="o", markersize=4.5, label=name)
        axes.plot([1 - source.density(None)], [packed[name].bytes_per_element], "*", color=color, markersize=11)
    axes.plot([], [], "*", color=style.INK, markersize=9, linestyle="none", label="this matrix")
    axes.axhline(2, color=style.QUIET, linewidth=1)
    axes.text(0.3, 2.03, "dense fp16", color=style.QUIET, fontsize=7)
    axes.set_ylim(0)
    axes.set_xticks(levels, [f"{100 * zeros:g} %" for zeros in levels])
    axes.set_xlabel("zeros")
    axes.set_ylabel("bytes per element")
    axes.legend(loc="lower left", fontsize=7.5)
    show(figure)

# %% [markdown]
# The lines are half of the rows of the matrix generated above, pruned to other fractions of zeros; the stars are the
# matrix that was read. Below the grey line a format is smaller than the dense matrix. The format with the fewest bytes
# is not always the fastest: it must also be decoded.
#
# ## Which one `auto` takes
#
# `auto` packs some rows in every format and feeds bytes and density into a time model that was fitted to measured rows:
# a start-up, plus the longer of reading and decoding. `rank_formats_of` returns the whole ranking.

# %%
BATCHES = (8, 16, 32, 64)


def ranking_table(ranking):
    """Formats of a ranking, fastest first, and dense."""
    lines = []
    for candidate in (*ranking.candidates, ranking.dense):
        times = [f"{us:.2f}" for us in candidate.us.values()]
        lines.append([candidate.format, f"{candidate.weight_bytes:,}", *times, candidate.reason])
    table(["format", "bytes", *(f"us at N = {n}" for n in BATCHES), "why"], lines)


for name, gpu in GPUS.items():
    ranking = auto.rank_formats_of(W, BATCHES, gpu=gpu)
    gain = ranking.dense.mean_us / ranking.best.mean_us
    print(f"{name}: {ranking.best.format}, {gain:.2f} times as fast as dense by the geometric mean over N")
    ranking_table(ranking)

# %% [markdown]
# For a matrix of this size nearly all the time is start-up, of which cuBLAS has less: a number below one says that
# packing does not pay off. A matrix of the shape of a large model's layer, with zeros distributed as in this one, is a
# different matter:

# %%
LARGE = (28672, 8192)
large = sample.representative(LARGE, W, list(FORMAT_COLORS), dtype="fp16")
for name, gpu in GPUS.items():
    ranking = auto.rank(large, BATCHES, gpu=gpu)
    gain = ranking.dense.mean_us / ranking.best.mean_us
    print(f"{name}, {LARGE[0]}x{LARGE[1]}: {ranking.best.format}, {gain:.2f} times as fast as dense")
    ranking_table(ranking)

# %%
with style.applied():
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    panels = figure.subplots(1, len(GPUS), sharey=True)
    for axes, (gpu_name, gpu) in zip(panels, GPUS.items(), strict=True):
        for i, name in enumerate(FORMAT_COLORS):
            for j, n in enumerate(BATCHES):
                one = model.predict(
                    name,
                    m=LARGE[0],
                    k=LARGE[1],
                    n=n,
                    weight_bytes=large.weight_bytes[name],
                    density=large.density,
                    gpu=gpu,
                )
                place = i + 0.2 * (j - 1.5)
                axes.bar(place, one.us, 0.17, color=style.RULE)
                axes.plot(place, one.start_us + one.read_us, "_", color="#0072b2", markersize=9, mew=2)
                axes.plot(place, one.start_us + one.decode_us, "_", color="#d55e00", markersize=9, mew=2)
                axes.text(place, 1.5, n, ha="center", fontsize=6.5)
        axes.axhline(model.dense_us(*LARGE, 64, gpu=gpu), color=style.QUIET, linewidth=1, label="cuBLAS, N = 64")
        axes.plot([], [], "_", color="#0072b2", markersize=9, mew=2, label="start-up and reading")
        axes.plot([], [], "_", color="#d55e00", markersize=9, mew=2, label="start-up and decoding")
        axes.set_xticks(range(len(FORMAT_COLORS)), FORMAT_COLORS)
        axes.set_title(f"{LARGE[0]}x{LARGE[1]}, {gpu_name}, by the model")
    panels[0].set_ylabel("us")
    panels[0].margins(y=0.1)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=7.5)
    show(figure)

# %% [markdown]
# Bars are the times for each N, which is written at their feet; marks show the start-up plus reading or decoding alone.
# The higher mark determines the time. A format with few bytes and costly decoding wins as long as decoding is hidden
# behind reading.
#
# `flashllm inspect FILE` prints the same for any file, along with the plan of each product:

# %%
name = Path(FILE).resolve() if FILE else "layer.npz"
command = [sys.executable, "-m", "flashllm", "inspect", name, "--n", "8,64", "--gpu", "H200"]
command += ["--tensor", TENSOR] if TENSOR else []
plain = {**os.environ, "FORCE_COLOR": ""}  # notebooks ask for colours
print(subprocess.run(command, cwd=FOLDER, env=plain, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# In Python, `inspection.inspect_matrix` returns these facts, and `inspection.as_json` turns them into plain values.

# %%
target = inspection.Target(gpu=GPUS["H200"], facts=facts_of(GPUS["H200"]))
facts = inspection.as_json(inspection.inspect_matrix("layer", W, (8, 64), target=target))
print({key: facts[key] for key in ("format", "bytes", "bytes_per_element", "tile_fill")})

# %% [markdown]
# ## Is the product right?
#
# Every format is checked at N = 16 against NumPy in float64. Errors are in units of the bound that flashllm promises
# for every element; one is the limit. Whole numbers are a stricter test: with small integers the result must be exact.


# %%
def product(x, w):
    """y = x Wᵀ, on the GPU where there is one, else by the GPU's kernel on the CPU emulator."""
    if BACKEND != "cuda":
        return flashllm.spmm(x, w, backend=BACKEND)
    import cupy

    return cupy.asnumpy(flashllm.spmm(cupy.asarray(x), w.to_device()))


x = random.standard_normal((16, W.shape[1])).astype(np.float16)
reference = check.make_reference(x.astype(float), W.astype(float), np.arange(W.shape[0]), "fp16")
whole = np.where(stored, random.integers(-3, 4, W.shape), 0).astype(np.float16)
whole_x = random.integers(-1, 2, x.shape).astype(np.float16)
whole_y = whole_x.astype(float) @ whole.T.astype(float)
assert np.abs(whole_y).max() < 2048  # every integer up to here is an fp16 number

lines = []
for name, w in packed.items():
    ratio = check.error_over_bound(product(x, w).astype(float), reference)
    exact = np.array_equal(product(whole_x, flashllm.pack(whole, format=name)), whole_y)
    lines.append([name, f"{ratio:.3f}", "exact" if exact else "WRONG"])
    assert ratio <= 1
    assert exact
print("products run on:", BACKEND)
table(["format", "largest error over bound", "whole numbers"], lines)

# %% [markdown]
# ## Save and load
#
# A weight is saved as a safetensors file: its buffers as tensors, the rest in the metadata. Loading validates it.

# %%
w = flashllm.pack(W, n=(8, 16))
w.save(FOLDER / "packed.safetensors", name="layer")
again = load_weight(FOLDER / "packed.safetensors")
assert type(again) is type(w)
assert all(np.array_equal(array, again.arrays()[name]) for name, array in w.arrays().items())

header = read_header(FOLDER / "packed.safetensors")
print(f"{again.format}, {again.shape[0]}x{again.shape[1]} {again.dtype}, {again.nnz:,} stored")
print(f"file {(FOLDER / 'packed.safetensors').stat().st_size:,} bytes, buffers {w.nbytes:,}")
print(header.metadata["weights"])
table(["tensor", "type", "shape"], [[name, entry.dtype, entry.shape] for name, entry in header.tensors.items()])
