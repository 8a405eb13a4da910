# SPDX-License-Identifier: Apache-2.0
"""How many zeros each matrix gets: a uniform share, more where a block has fewer outliers, or by a global threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashllm.errors import ArgumentError

OWL_THRESHOLD = 5.0
"""An element is an outlier if its score is above this many times the mean score of its matrix."""
OWL_SPREAD = 0.08
"""Half of the difference in sparsity between the most and the least sparse block."""


def check_sparsity(sparsity: Any) -> None:
    """Raise ``ArgumentError`` unless it is a fraction of zeros below 1."""
    if not isinstance(sparsity, (int, float, np.floating)) or not 0.0 <= sparsity < 1.0:
        raise ArgumentError("sparsity", expected="a fraction of zeros in [0, 1)", got=str(sparsity))


def outlier_share(scores: Any) -> float:
    """Share of elements of ``scores`` [M, K] that are above ``OWL_THRESHOLD`` times their mean."""
    return float((scores > OWL_THRESHOLD * scores.mean()).mean())


def owl(shares: Sequence[float], sparsity: float) -> list[float]:
    """Sparsities of blocks from their ``shares`` of outliers; their mean is ``sparsity``.

    Yin et al., "Outlier weighed layerwise sparsity (OWL)", ICML'24, section 3: the more outliers a block has, the fewer
    zeros it gets, linearly over a range of twice ``OWL_SPREAD``. The range is narrower where a sparsity would leave
    0..1.
    """
    check_sparsity(sparsity)
    given = np.asarray(shares, np.float64)
    span = given.max() - given.min()
    if span == 0:
        return [sparsity] * len(given)
    spread = min(OWL_SPREAD, sparsity, 1 - sparsity)
    kept = (given - given.min()) / span * 2 * spread
    # The mean of `kept` may lie anywhere in 0..2 spread, so that one side can reach 2 spread from the mean.
    wanted = sparsity - (kept - kept.mean())
    over = max(wanted.max() - 1, -wanted.min(), 0.0)
    if over > 0:
        wanted = sparsity + (wanted - sparsity) * (1 - over / np.abs(wanted - sparsity).max())
    return [float(value) for value in wanted]


def magnitude_counts(bits: NDArray[np.uint16]) -> NDArray[np.int64]:
    """How many elements of 16-bit floats have each magnitude: int64 [32768], in rising order, NaN last."""
    return np.bincount((bits & 0x7FFF).reshape(-1), minlength=1 << 15)


def global_sparsities(counts: Mapping[str, NDArray[np.int64]], sparsity: float) -> dict[str, float]:
    """Sparsities of matrices from their :func:`magnitude_counts`, for pruning the smallest elements of all together.

    Among equal magnitudes at the threshold, those of the first matrices are pruned.
    """
    check_sparsity(sparsity)
    total = sum(counts.values())
    if not isinstance(total, np.ndarray):
        raise ArgumentError("counts", expected="at least one matrix", got="none")
    wanted = round(sparsity * int(total.sum()))
    below = np.concatenate([[0], np.cumsum(total)])  # elements under each magnitude
    threshold = int(np.searchsorted(below, wanted, side="right")) - 1
    ties = wanted - int(below[threshold])
    found = {}
    for name, count in counts.items():
        taken = min(ties, int(count[threshold])) if threshold < len(count) else 0
        ties -= taken
        found[name] = (int(count[:threshold].sum()) + taken) / int(count.sum())
    return found
