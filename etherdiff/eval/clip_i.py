"""CLIP-I: how much the generated images show the same kind of thing as the real ones."""

from torch import Tensor

from etherdiff.eval.pairs import PairMean, cosine_pairs


class ClipI(PairMean):
    """Mean cosine over all pairs real x generated of CLIP's image embeddings. In [-1, 1]; higher is better."""

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def update(self, real: Tensor, generated: Tensor) -> None:
        """Embeddings of the real images (R, D) and of the generated ones (G, D)."""
        self._add(cosine_pairs(real, generated))
