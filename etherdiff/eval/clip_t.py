"""CLIP-T: how much the generated images show what their prompts say."""

from torch import Tensor

from etherdiff.eval.pairs import PairMean, cosine_rows


class ClipT(PairMean):
    """Mean cosine of each image's CLIP embedding with its own prompt's. In [-1, 1]; higher is better.

    Not clipped at 0 and not multiplied by 100, which torchmetrics' CLIPScore does to a mean of the same cosines.
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def update(self, images: Tensor, texts: Tensor) -> None:
        """Embeddings of N images and of their N prompts, both (N, D)."""
        self._add(cosine_rows(images, texts))
