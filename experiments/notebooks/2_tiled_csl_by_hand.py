# SPDX-License-Identifier: Apache-2.0
# %% [markdown]
# # Tiled-CSL by hand
#
# Tiled-CSL is the format of the Flash-LLM paper: one 32-bit word for each stored element, half of it the value and half
# the place in the tile. This notebook takes one tile of a pruned matrix apart: which elements it has, what its words
# encode, which banks of shared memory they are stored to, and what their order gains. Then the GPU's kernel multiplies
# the tile on the CPU emulator, which counts bank conflicts independently. No GPU is needed. The format is specified in
# `docs/formats/tiled_csl.md`.

# %%
from collections import Counter

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import flashllm
from experiments.figures import style
from experiments.notebooks.shown import show, table
from flashllm import backends
from flashllm.backends import emulator

ROWS, COLUMNS, BANKS = 128, 64, 32
COLORS = {"row": "#0072b2", "bank": "#d55e00"}  # of the two orders

# %% [markdown]
# ## The tile
#
# The matrix has rows of different scale and is pruned by magnitude over the whole matrix, as one-shot pruning does. Its
# tiles are 128 rows by 64 columns; this is the first one.

# %%
random = np.random.default_rng(7)
W = random.standard_normal((4 * ROWS, 4 * COLUMNS)) * np.exp(0.25 * random.standard_normal((4 * ROWS, 1)))
W[np.abs(W) < np.quantile(np.abs(W), 0.8)] = 0
W = W.astype(np.float16)
tile = W[:ROWS, :COLUMNS].copy()

print(f"matrix  {W.shape[0]}x{W.shape[1]}, {np.mean(W == 0):.1%} zeros")
print(f"tile    {np.count_nonzero(tile)} of {tile.size} elements stored, {np.mean(tile == 0):.1%} zeros")

with style.applied():
    figure = Figure(figsize=(9.5, 4.3), layout="constrained")
    axes = figure.subplots()
    drawn = np.ma.masked_equal(tile.T.astype(float), 0)
    picture = axes.imshow(drawn, cmap="coolwarm", vmin=-4, vmax=4, interpolation="nearest")
    axes.set_facecolor("white")
    axes.set_xticks(range(0, ROWS + 1, 16))
    axes.set_yticks(range(0, COLUMNS + 1, 8))
    axes.grid(visible=False)
    axes.set_xlabel("row of the tile")
    axes.set_ylabel("column of the tile")
    figure.colorbar(picture, ax=axes, shrink=0.8, label="value")
    show(figure)

# %% [markdown]
# The tile is drawn transposed; white elements are zeros and are not stored. Rows of a large scale keep more elements
# than others, so the tile is not evenly filled.
#
# ## A word
#
# ```
#  31            16 15             0
# +----------------+----------------+
# |    location    |     value      |      location = r * 64 + (c ^ ((r & 7) * 8))
# +----------------+----------------+
# ```
#
# The location is where the value goes in shared memory, counted in 2-byte values. It is row-major, except that the
# eight chunks of eight columns are permuted by the row number, so that the tensor cores' reads of a column of chunks
# hit different banks. The exclusive or is its own inverse, so a reader recovers row and column by the same rule.

# %%
packed = {order: flashllm.TiledCSL.from_dense(tile, order=order) for order in ("row", "bank")}


def decode(word):
    """Location, row, column and value of a word."""
    location, bits = int(word) >> 16, int(word) & 0xFFFF
    r = location >> 6
    c = (location & 63) ^ ((r & 7) * 8)
    return location, r, c, np.uint16(bits).view(np.float16)


lines = []
for word in packed["row"].words[:12]:
    location, r, c, value = decode(word)
    lines.append([f"`{int(word):08x}`", location, location >> 6, location & 63, (r & 7) * 8, r, c, value, tile[r, c]])
table(["word", "location", ">> 6", "& 63", "(r & 7) * 8", "row", "column", "value", "in the tile"], lines)

# %% [markdown]
# These are the first words in row order. Now all words of both orders are decoded: every element is there once, with
# its 16 bits. The words are padded to a multiple of four, since a thread loads four at a time; a padding word stores a
# zero where the tile has a zero anyway.

# %%
for order, w in packed.items():
    places = [decode(word) for word in w.words]
    rebuilt = np.zeros_like(tile)
    for _, r, c, value in places:
        rebuilt[r, c] = value
    assert len({location for location, *_ in places}) == len(places)
    assert np.array_equal(rebuilt, tile)
    padding = len(w.words) - w.nnz
    print(f"{order:<5} {len(w.words)} words, {padding} of padding, {w.nbytes:,} bytes; dense {tile.nbytes:,}")

# %%
swizzled = np.empty((8, COLUMNS), int)
for r in range(8):
    for c in range(COLUMNS):
        swizzled[r, c ^ ((r & 7) * 8)] = c // 8

with style.applied():
    figure = Figure(figsize=(9.5, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(swizzled, cmap="viridis", vmin=-1, vmax=8, aspect="auto", interpolation="nearest")
    for r in range(8):
        for chunk in range(8):
            number = swizzled[r, 8 * chunk]
            color = "white" if number < 5 else style.INK
            axes.text(8 * chunk + 3.5, r, number, ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(np.arange(0, COLUMNS, 8) - 0.5, [f"bank {4 * chunk}" for chunk in range(8)])
    axes.set_yticks(range(8))
    axes.grid(visible=False)
    axes.set_xlabel("place in shared memory: a row of 64 values is 128 bytes, all 32 banks")
    axes.set_ylabel("row")
    show(figure)

# %% [markdown]
# The numbers are chunks i of the matrix (columns 8 i to 8 i + 7), shown where they lie in shared memory, for the first
# eight rows; the rows below repeat this pattern. Each chunk appears once in every column of the picture, so eight rows
# of one chunk cover all banks.
#
# ## 32 lanes, 32 banks
#
# A warp loads 128 words at a time, lane l the words 4 l to 4 l + 3, and stores them in four rounds: in round v each
# lane stores its word v. Shared memory has 32 banks of four bytes. In one pass it serves one four-byte word of every
# bank, so a round takes as many passes as its busiest bank has words. (Two values in the two halves of one four-byte
# word are served together.)


# %%
def rounds_of(words):
    """For each round, the four-byte words that its lanes store to, lane by lane."""
    groups = [words[start : start + 4 * BANKS] for start in range(0, len(words), 4 * BANKS)]
    return [[(int(word) >> 16) // 2 for word in group[v::4]] for group in groups for v in range(4)]


def bank_counts(targets):
    """Number of different four-byte words in each bank."""
    count = Counter(target % BANKS for target in set(targets))
    return np.array([count[bank] for bank in range(BANKS)])


rounds = {order: rounds_of(w.words) for order, w in packed.items()}
hits = {order: np.array([bank_counts(targets) for targets in found]) for order, found in rounds.items()}
passes = {order: counts.max(axis=1) for order, counts in hits.items()}

with style.applied():
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (order, found) in zip(panels, rounds.items(), strict=True):
        targets, lanes = np.array(found[0]), np.arange(len(found[0]))
        banks, crowd = targets % BANKS, hits[order][0][targets % BANKS]
        for most, color in ((1, "#009e73"), (2, "#e69f00"), (99, "#d55e00")):
            least = {1: 1, 2: 2, 99: 3}[most]
            here = (crowd >= least) & (crowd <= most)
            axes.plot(lanes[here], banks[here], "o", color=color, markersize=5.5)
        axes.set_xticks(range(0, 33, 4))
        axes.set_yticks(range(0, 33, 4))
        axes.grid(visible=True, axis="both")
        axes.set_xlabel("lane")
        axes.set_title(f'order="{order}", round 0: {passes[order][0]} passes'.replace(" 1 passes", " 1 pass"))
    panels[0].set_ylabel("bank that its store hits")
    colors = {"alone in its bank": "#009e73", "two in the bank": "#e69f00", "three or more": "#d55e00"}
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7.5)
    show(figure)

# %% [markdown]
# The first store of a warp in both orders; each point is a lane and the bank that it hits. In row order the mask
# decides which banks the lanes hit. In bank order lane and bank have the same number, and one pass serves all lanes.
#
# ## All rounds
#
# The encoder gives round k the k-th word of every bank, as long as all banks have one, and lets the rest wrap around,
# so that words of one bank share a round only when they must. Apart from values that share a four-byte word, no order
# can manage with fewer passes than the fullest bank has words.

# %%
with style.applied():
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(5, 1.4, 5, 1.4))
    shades = ListedColormap(["white", "#cfe8dd", "#f3cf85", "#e69f00", "#d55e00", "#8a3d00"])
    for i, (order, counts) in enumerate(hits.items()):
        axes, bars = panels[2 * i], panels[2 * i + 1]
        axes.imshow(counts, cmap=shades, vmin=-0.5, vmax=5.5, aspect="auto", interpolation="nearest")
        axes.set_xticks(range(0, BANKS + 1, 8))
        axes.set_xlabel("bank")
        axes.grid(visible=False)
        axes.set_title(f'order="{order}"')
        bars.barh(range(len(counts)), passes[order], height=0.8, color=COLORS[order])
        bars.set_xlim(0, max(map(max, passes.values())))
        bars.set_xlabel("passes")
        bars.grid(visible=False)
        bars.set_title(f"sum {passes[order].sum()}")
    panels[0].set_ylabel("round")
    labels = ("none", "1 word", "2 words", "3 words", "4 words", "5 or more")
    handles = [Patch(facecolor=shades(k), edgecolor=style.RULE, label=label) for k, label in enumerate(labels)]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=7.5)
    show(figure)

# %% [markdown]
# Each line is a round and each square one of its banks, coloured by how many words the round stores there; the bars
# show the passes that the round takes. In row order some bank is hit several times in nearly every round, while others
# are idle. In bank order each bank receives one word per round, until at the end only the fuller banks are left.

# %%
locations = packed["bank"].words >> 16
fullest = np.bincount(locations // 2 % BANKS, minlength=BANKS).max()
lines = [
    [order, len(rounds[order]), fullest, found.sum(), f"{found.sum() / fullest:.2f}"] for order, found in passes.items()
]
table(["order", "rounds", "words of the fullest bank", "passes", "over the fullest bank"], lines)

# %% [markdown]
# ## The kernel's own count
#
# Now the kernel itself: the emulator runs the GPU's source on the CPU, lane by lane, and counts requests (one
# instruction of a warp) and wavefronts (passes) of its 2-byte stores. Threads past the end of the tile load its last
# four words again; their stores all go to one place and take one pass each. The passes lost to conflicts must equal
# those counted by hand.

# %%
x = random.standard_normal((16, COLUMNS)).astype(np.float16)
want = x.astype(float) @ tile.T.astype(float)
lines, outputs = [], {}
for order, w in packed.items():
    outputs[order], counts = emulator.spmm(x, w)
    by_hand = passes[order].sum() - len(rounds[order])
    error = np.abs(outputs[order] - want).max()
    lines.append(
        [order, counts.scatter.requests, counts.scatter.wavefronts, counts.scatter.conflicts, by_hand, f"{error:.1e}"]
    )
    assert counts.scatter.conflicts == by_hand
assert np.array_equal(outputs["row"], outputs["bank"])
head = ["order", "requests", "wavefronts", "lost to conflicts", "by hand", "max abs(y - NumPy)"]
table(head, lines)

# %% [markdown]
# Both orders give the same bits of y: the order changes when a value is stored, not what is added up. The error
# against NumPy's float64 product is the rounding of y to fp16. In a walk over several tiles every tile is stored twice,
# the second time as zeros that clear it, so each conflict counts twice. For the whole matrix, by fraction of zeros:

# %%
full = random.standard_normal(W.shape)
ZEROS = (0.5, 0.6, 0.7, 0.8, 0.9)
lost = {order: [] for order in COLORS}
for zeros in ZEROS:
    pruned = np.where(np.abs(full) < np.quantile(np.abs(full), zeros), 0, full).astype(np.float16)
    wide = random.standard_normal((16, W.shape[1])).astype(np.float16)
    for order in COLORS:
        _, counts = emulator.spmm(wide, flashllm.TiledCSL.from_dense(pruned, order=order))
        lost[order].append(counts.scatter.wavefronts / counts.scatter.requests)

with style.applied():
    figure = Figure(figsize=(5.6, 3.1), layout="constrained")
    axes = figure.subplots()
    for order, color in COLORS.items():
        axes.plot(ZEROS, lost[order], color=color, marker="o", markersize=5, label=f'order="{order}"')
    axes.axhline(1, color=style.QUIET, linewidth=1)
    axes.set_ylim(0.9)
    axes.set_xticks(ZEROS, [f"{100 * zeros:g} %" for zeros in ZEROS])
    axes.set_xlabel("zeros")
    axes.set_ylabel("passes per store instruction")
    axes.legend(loc="center right", fontsize=7.5)
    show(figure)

# %% [markdown]
# Passes of all 2-byte stores divided by their instructions, counted by the emulator; at the grey line there are no
# conflicts. `3_where_the_time_goes` shows what the order gains in time.
#
# On a machine with a GPU the same tile is multiplied there too:

# %%
if backends.select(None).name == "cuda":
    import cupy

    y = cupy.asnumpy(flashllm.spmm(cupy.asarray(x), packed["bank"].to_device()))
    print("largest difference from the emulator:", np.abs(y.astype(float) - outputs["bank"].astype(float)).max())
else:
    print("no GPU here")
