"""How far a score would move with other prompts or images: bootstrap intervals of 95%.

What is drawn again, with replacement, is the unit that the score speaks of:

- one subject with 5 prompts or more: prompts, each with its images, since images of one prompt resemble each other. The
  interval says how the score would move with other prompts; the real images and the trained adapter stay as they are.
- fewer prompts: the single images, which says only how it would move with other seeds.
- controllable generation: images, each with its map. What is summed over them (areas of classes, edge pixels) is drawn again.
- several subjects: subjects. The interval speaks of other subjects, which is what a table over subjects claims.
- real images among themselves: the real images.
- FID: nothing is drawn again, because repeated images raise it. Blocks of images are left out in turn (jackknife).

Where nothing can be drawn again (a single unit) there is no interval: None, never a width of zero.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 2000
LEVEL = 0.95
MIN_PROMPTS = 5
"""Below it prompts are too few to be drawn again, and images are."""
MIN_IN_PAIRS = 3
"""Two things make one pair, whose mean cannot vary."""
_STREAM = 0x6576616C  # keeps these numbers apart from those of training with the same seed

Interval = tuple[float, float]


def interval_text(low: float | None, high: float | None) -> str:
    """Write an interval as [low, high]; a dash where there is none."""
    return "-" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"


def bootstrap_mean(totals: ArrayLike, counts: ArrayLike, seed: int = 0, draws: int = DRAWS) -> Interval | None:
    """Percentile interval of Σ totals / Σ counts when units are drawn again.

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
    """Percentile interval of a statistic of sums over units when the units are drawn again.

    Args:
        units: (N, ...) what each unit adds to the sums.
        statistic: from (draws, ...) sums to (draws,) values; NaN where the sums have none, which is left out.

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
    """Percentile interval of the mean over pairs within groups when each group's members are drawn again.

    A member drawn twice makes no pair with itself, whose value (distance 0, cosine 1) would be no pair's.

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
    """Normal interval around `value` from the scores without each of `blocks` equal blocks; cut at 0.

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
