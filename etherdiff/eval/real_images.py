"""What real photos of the thing score among themselves: the table's first row, to read the others by."""

from torch import Tensor

from etherdiff.eval.pairs import PairMean, upper_pairs


class RealImages(PairMean):
    """Mean of a similarity or distance over the pairs real x other real."""

    def update(self, values: Tensor) -> None:
        """`cosine_pairs` or `lpips_distances` among the real images, symmetric (R, R); its diagonal is not counted."""
        self._add(upper_pairs(values))


class RealSimilarity(RealImages):
    """Of cosines. In [-1, 1]; higher is better."""

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0


class RealDistance(RealImages):
    """Of LPIPS. At least 0; higher is better, as for `LpipsToReal`."""

    higher_is_better = True
    plot_lower_bound = 0.0
