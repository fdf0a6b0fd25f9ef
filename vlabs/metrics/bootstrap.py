"""Percentile bootstrap intervals of a mean (Efron and Tibshirani, An Introduction to the Bootstrap, 1993)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap

# Resampled values held at once, so that a whole validation split needs no more memory than a small one.
_MOST_DRAWN = 2**22


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(values: ArrayLike, num_samples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean of one value per question, with its percentile bootstrap interval.

    Questions are resampled as if they were independent. Questions about one image are not, so the interval is a little
    too narrow; pass one mean per image to be strict.

    Args:
        values: (n,), at least two.
        num_samples: how often n values are drawn, with replacement.
        confidence: share of the resampled means that lie inside, in (0, 1).
        seed: the same seed draws the same questions for any values of the same length.

    Raises:
        ValueError: fewer than two values, a value that is not finite, or an option out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"a bootstrap needs a list of at least two values, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite: leave out the other questions, or count them as 0")
    if num_samples < 1 or not 0 < confidence < 1:
        raise ValueError(f"num_samples={num_samples} must be 1 or more, and confidence={confidence} between 0 and 1")
    mean = float(array.mean())
    if (array == array[0]).all():
        return Interval(mean, mean, mean)  # scipy would warn, and return NaN
    found = bootstrap(
        (array,),
        np.mean,
        n_resamples=num_samples,
        batch=max(1, _MOST_DRAWN // len(array)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, num_samples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of a − b with its interval, for two models that were asked the same questions.

    Each sample draws the same questions for both, so that the difficulty of questions cancels out. If the interval does
    not contain 0, the models differ.

    Args:
        a, b: (n,), the values of the same questions in the same order.
        num_samples, confidence, seed: as in `bootstrap_interval`.

    Raises:
        ValueError: a and b differ in length, or as in `bootstrap_interval`.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape} and b {second.shape}: both need one value for each question")
    return bootstrap_interval(first - second, num_samples, confidence, seed)
