"""How far a score would move with other prompts or images: bootstrap intervals of 95%.

What is resampled, with replacement, depends on the score:

- one subject with 5 prompts or more: prompts, each with its images, since images of one prompt resemble each other. The
  interval covers other prompts; the real images and the trained adapter stay the same.
- fewer prompts: the single images. The interval covers other seeds only.
- controllable generation: images, each with its map. Their sums (areas of classes, edge pixels) are computed again.
- several subjects: subjects. The interval covers other subjects, as a table over subjects claims.
- real images among themselves: the real images.
- FID: nothing is resampled, because repeated images raise it. Blocks of images are left out in turn (jackknife).

Where nothing can be resampled (a single unit) there is no interval: None, never a width of zero.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
LEVEL = 0.95
MIN_PROMPTS = 5
"""Minimum number of prompts to resample; below it, images are resampled."""
MIN_IN_PAIRS = 3
"""Minimum number of members of a group: two make only one pair, whose mean cannot vary."""
_STREAM = 0x6576616C  # separates these random numbers from those of training with the same seed

Interval = tuple[float, float]


def interval_text(low: float | None, high: float | None) -> str:
    """Write an interval as [low, high]; a dash where there is none."""
    return "-" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def bootstrap_mean(totals: ArrayLike, counts: ArrayLike, seed: int = 0, draws: int = DRAWS) -> Interval | None:
    """Compute the percentile interval of Σ totals / Σ counts when units are resampled.

    Args:
        totals, counts: (units,) sum and number of the values in each unit (prompt, image or subject).
        seed: equal seeds give equal intervals.

    Returns:
        The 2.5th and the 97.5th percentile; None for fewer than two units with values in them.
    """
    total, count = np.asarray(totals, np.float64), np.asarray(counts, np.float64)
    kept = count > 0
    if kept.sum() < 2:
        return None
    total, count = total[kept], count[kept]
    chosen = _rng(seed).integers(len(total), size=(draws, len(total)))
    return _percentiles(total[chosen].sum(1) / count[chosen].sum(1))


def bootstrap_sums(
    units: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    seed: int = 0,
    draws: int = DRAWS,
) -> Interval | None:
    """Compute the percentile interval of a statistic of sums over units when the units are resampled.

    Args:
        units: (N, ...) what each unit adds to the sums.
        statistic: from (draws, ...) sums to (draws,) values; NaN is left out.

    Returns:
        As `bootstrap_mean`; None for fewer than two units, or where no draw has a value.
    """
    table = np.asarray(units, np.float64)
    if len(table) < 2:
        return None
    times = _rng(seed).multinomial(len(table), np.full(len(table), 1 / len(table)), size=draws).astype(np.float64)
    values = statistic((times @ table.reshape(len(table), -1)).reshape(draws, *table.shape[1:]))
    values = values[~np.isnan(values)]
    return _percentiles(values) if len(values) else None


def bootstrap_pairs(groups: Sequence[NDArray[np.float64]], seed: int = 0, draws: int = DRAWS) -> Interval | None:
    """Compute the percentile interval of the mean over pairs within groups when the members of each group are resampled.

    A member that is drawn twice makes no pair with itself: its value (distance 0, cosine 1) is not that of a pair.

    Args:
        groups: symmetric (n, n) values of pairs.

    Returns:
        As `bootstrap_mean`; None where no group has `MIN_IN_PAIRS` members.
    """
    if max((len(group) for group in groups), default=0) < MIN_IN_PAIRS:
        return None
    rng, totals, counts = _rng(seed), np.zeros(draws), np.zeros(draws)
    for group in groups:
        times = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), size=draws).astype(np.float64)
        apart = 1.0 - np.eye(len(group))
        totals += np.einsum("di,ij,dj->d", times, np.where(apart > 0, group, 0.0), times, optimize=True)
        counts += np.einsum("di,ij,dj->d", times, apart, times, optimize=True)
    return _percentiles(totals[counts > 0] / counts[counts > 0])


def jackknife(without: Callable[[int], float], blocks: int, value: float) -> Interval | None:
    """Compute a normal interval around `value` from the scores without each of `blocks` equal blocks; cut at 0.

    Args:
        without: the score with the given block left out.
    """
    if blocks < 2:
        return None
    left = np.array([without(block) for block in range(blocks)])
    deviation = float(np.sqrt((blocks - 1) * np.mean((left - left.mean()) ** 2)))
    return max(0.0, value - 1.959964 * deviation), value + 1.959964 * deviation


def _rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM], dtype=np.uint64)))


def _percentiles(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
