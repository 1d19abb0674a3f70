"""FID: the distance between two sets of images, as that of the normal distributions of their features."""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

FEW_FEATURES = 64
MIN_FOR_MANY_FEATURES = 1000
"""Images on each side from which more than `FEW_FEATURES` features mean something; the paper has 2000."""


def frechet_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """‖μ - ν‖² + tr(Σ + Λ - 2 (Σ Λ)^½) (Heusel et al. 2017, equation 6), in float64, at least 0.

    The trace of the root is that of (√Σ Λ √Σ)^½, whose eigenvalues are real: no complex parts to drop.

    Args:
        mean, other_mean: (D,).
        covariance, other_covariance: symmetric (D, D).
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other_covariance.double() @ root).clamp(min=0).sqrt().sum()
    apart = (mean.double() - other_mean.double()).square().sum()
    return (apart + covariance.trace() + other_covariance.trace() - 2 * cross).clamp(min=0)


def moments(total: Tensor, products: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) from sums: of features (D,), of their outer products (D, D), and how many."""
    mean = total / count
    return mean, (products - count * torch.outer(mean, mean)) / (count - 1)


def fid_problem(real: int, generated: int, features: int) -> str | None:
    """Why an FID of so many images would mislead, if it would: its bias falls with the number of images on both sides."""
    if real != generated:
        return f"{real} real and {generated} generated images, but FID needs the same number of both"
    if features > FEW_FEATURES and real < MIN_FOR_MANY_FEATURES:
        return f"{real} images are too few for {features} features: {MIN_FOR_MANY_FEATURES}, or at most {FEW_FEATURES} features"
    if features <= FEW_FEATURES and real <= features:
        return f"{real} images are too few for {features} features: more images than features are needed"
    return None


class Fid(FrechetInceptionDistance):
    """torchmetrics' sums over features that are already computed; the distance is `frechet_distance`.

    At least 0; lower is better. `compute` gives a float64 scalar; with fewer than two images on a side it raises
    RuntimeError.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(feature=_Features(num_features))

    def update(self, imgs: Tensor, real: bool) -> None:
        """Features (N, `num_features`) of real or of generated images. Raises ValueError for any that is not finite."""
        if imgs.ndim != 2 or not torch.isfinite(imgs).all():
            raise ValueError(f"expected finite features (N, D), got {tuple(imgs.shape)}")
        super().update(imgs, real)

    def compute(self) -> Tensor:
        if self.real_features_num_samples < 2 or self.fake_features_num_samples < 2:
            raise RuntimeError("FID needs two images or more on each side")
        real = moments(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        fake = moments(self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples)
        return frechet_distance(*real, *fake)


class _Features(nn.Module):
    """The network of an FID whose images are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
