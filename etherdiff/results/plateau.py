"""Over how many decades of a setting a method keeps most of its own best score: what "needs no tuning" means as a number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

SHARE = 0.9
"""Of the best score that has to be kept, unless another is asked for."""


@dataclass(frozen=True)
class Plateau:
    """Where a score is good enough, around its best."""

    low: float
    high: float
    """The ends of the range."""
    open_low: bool
    open_high: bool
    """Whether the score was still good enough at the end of what was tried."""

    @property
    def decades(self) -> float:
        """log₁₀ of high / low; at least that, where an end is open."""
        return math.log10(self.high / self.low)

    @property
    def is_lower_bound(self) -> bool:
        return self.open_low or self.open_high


def find_plateau(
    points: Sequence[tuple[float, float | None]], higher_is_better: bool = True, share: float = SHARE
) -> Plateau | None:
    """The range around the best score in which the score stays good enough without a break.

    Good enough is `share` of the best or more; for scores of which lower is better, the best over `share` or less. Between two
    settings that were tried the score is taken to run straight over the logarithm of the setting.

    Args:
        points: setting (> 0) and score, by rising setting; None where the run failed, so that there is no score: the range ends
            at the setting before, since nothing is known of what lies between.

    Returns:
        None where there is no score, or the best is not above 0, of which no share can be taken.
    """
    known = [(at, score) for at, score in points if score is not None]
    if not known:
        return None
    best_at, best = (max if higher_is_better else min)(known, key=lambda point: point[1])
    if best <= 0:
        return None
    limit = best * share if higher_is_better else best / share
    place = next(number for number, (at, _) in enumerate(points) if at == best_at)
    high, open_high = _end(points[place:], limit, higher_is_better)
    low, open_low = _end(points[place::-1], limit, higher_is_better)
    return Plateau(low, high, open_low, open_high)


def _end(points: Sequence[tuple[float, float | None]], limit: float, higher_is_better: bool) -> tuple[float, bool]:
    """How far it is good enough from the first point on, which is; and whether that is the last that was tried."""
    (at, score), *others = points
    assert score is not None
    for further, other in others:
        if other is None:
            return at, False
        if other < limit if higher_is_better else other > limit:
            share = (score - limit) / (score - other)
            return 10 ** (math.log10(at) + share * (math.log10(further) - math.log10(at))), False
        at, score = further, other
    return at, True
