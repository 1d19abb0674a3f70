"""LPIPS to the real images: how far the generated images are from copies. The column "LPIPS" of the paper's table."""

from torch import Tensor

from etherdiff.eval.pairs import PairMean


class LpipsToReal(PairMean):
    """Mean LPIPS over all pairs real x generated. At least 0; higher is better, in the sense of copying less."""

    higher_is_better = True
    plot_lower_bound = 0.0

    def update(self, distances: Tensor) -> None:
        """`lpips_distances` of the generated and the real images, (G, R)."""
        self._add(distances)
