"""LPIPS diversity: how much the images of one prompt differ among themselves, as DreamBooth measures it."""

from torch import Tensor

from etherdiff.eval.pairs import PairMean, upper_pairs


class LpipsDiversity(PairMean):
    """Mean LPIPS over the pairs of different images of the same prompt. At least 0; higher is better."""

    higher_is_better = True
    plot_lower_bound = 0.0

    def update(self, distances: Tensor) -> None:
        """`lpips_distances` among the images of one prompt, symmetric (G, G); its diagonal is not counted."""
        self._add(upper_pairs(distances))
