"""The denoising loss against the sum written out by hand and against diffusers' own training script."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn

from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import debiased_weight, denoising_loss, loss_weighting, min_snr_weight
from etherdiff.families.sd1 import load_base

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's noise schedule, by its definition."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


class Affine(nn.Module):
    """A 'UNet' simple enough to compute by hand: 2 x + t / 1000 + mean of the text."""

    def forward(self, x, timesteps, text, return_dict=True):
        assert return_dict is False
        shift = timesteps.double() / 1000 + text.double().mean(dim=(1, 2))
        return ((2 * x.double() + shift[:, None, None, None]).to(x.dtype),)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    size = len(TIMESTEPS)
    latents, noise = torch.randn(size, 4, 8, 8), torch.randn(size, 4, 8, 8)
    return latents, torch.randn(size, 7, 5), noise, TIMESTEPS


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_by_hand(batch, prediction_type):
    latents, text, noise, timesteps = batch
    loss = denoising_loss(Affine(), scheduler(prediction_type), *batch)
    assert loss.shape == (len(timesteps),)
    assert loss.dtype == torch.float32
    for i, t in enumerate(timesteps.tolist()):
        kept, added = alphas_cumprod()[t].sqrt(), (1 - alphas_cumprod()[t]).sqrt()
        x, eps = latents[i].double(), noise[i].double()
        predicted = 2 * (kept * x + added * eps) + t / 1000 + text[i].double().mean()
        target = eps if prediction_type == "epsilon" else kept * eps - added * x
        expected = ((predicted - target) ** 2).mean()
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_loss_is_that_of_diffusers_training_script(prediction_type, gamma):
    """train_dreambooth_lora.py's lines, and for the SNR weights those of train_text_to_image_lora.py."""
    model = load_base(find_base("tiny", prediction_type))
    unet, noise_scheduler = model.unet, model.noise_scheduler
    assert isinstance(unet, UNet2DConditionModel)
    torch.manual_seed(0)
    model_input, noise = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
    timesteps = torch.tensor([10, 400, 990])
    encoder_hidden_states = torch.randn(3, 77, unet.config.cross_attention_dim)
    ours = denoising_loss(
        unet, noise_scheduler, model_input, encoder_hidden_states, noise, timesteps, loss_weighting(gamma, False)
    )

    noisy_model_input = noise_scheduler.add_noise(model_input, noise, timesteps)
    with torch.no_grad():
        model_pred = unet(noisy_model_input, timesteps, encoder_hidden_states).sample
    if noise_scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = noise_scheduler.get_velocity(model_input, noise, timesteps)
    if gamma is None:
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        assert ours.mean().item() == pytest.approx(loss.item(), rel=1e-6)
        return
    alpha = noise_scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / snr if prediction_type == "epsilon" else weights / (snr + 1)
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=(1, 2, 3)) * weights
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weights_are_the_published_ones(prediction_type, gamma):
    """Hang et al. 2023: min(SNR, gamma) for a prediction of x0, divided by what the other targets' errors are scaled by."""
    weights = min_snr_weight(scheduler(prediction_type), TIMESTEPS, gamma)
    assert weights.shape == TIMESTEPS.shape
    for weight, t in zip(weights.tolist(), TIMESTEPS.tolist(), strict=True):
        alpha = alphas_cumprod()[t].item()
        snr = alpha / (1 - alpha)
        expected = min(1, gamma / snr) if prediction_type == "epsilon" else min(snr, gamma) / (snr + 1)
        assert weight == pytest.approx(expected, rel=1e-4)
        assert 0 < weight <= 1


def test_min_snr_multiplies_each_sample(batch):
    noise_scheduler = scheduler("epsilon")
    plain = denoising_loss(Affine(), noise_scheduler, *batch)
    weighted = denoising_loss(Affine(), noise_scheduler, *batch, loss_weighting(5.0, False))
    torch.testing.assert_close(weighted, plain * min_snr_weight(noise_scheduler, TIMESTEPS, 5.0))
    assert not torch.allclose(weighted, plain)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_debiased_weights_count_an_error_in_the_image_alike(prediction_type, batch):
    """Yu et al. 2023: sqrt(SNR) for a prediction of x0, whichever target the error is of."""
    weights = loss_weighting(None, True)(scheduler(prediction_type), TIMESTEPS)
    for weight, t in zip(weights.tolist(), TIMESTEPS.tolist(), strict=True):
        alpha = alphas_cumprod()[t].item()
        snr = alpha / (1 - alpha)
        expected = snr**-0.5 if prediction_type == "epsilon" else snr**0.5 / (snr + 1)
        assert weight == pytest.approx(expected, rel=1e-4)
    plain = denoising_loss(Affine(), scheduler(prediction_type), *batch)
    weighted = denoising_loss(Affine(), scheduler(prediction_type), *batch, debiased_weight)
    torch.testing.assert_close(weighted, plain * weights)


def test_without_a_weighting_the_loss_is_plain():
    assert loss_weighting(None, False) is None


def test_samples_do_not_touch_each_other(batch):
    together = denoising_loss(Affine(), scheduler("epsilon"), *batch)
    alone = [denoising_loss(Affine(), scheduler("epsilon"), *(x[i : i + 1] for x in batch)) for i in range(len(TIMESTEPS))]
    torch.testing.assert_close(torch.cat(alone), together)


def test_a_half_precision_prediction_is_compared_in_float32(batch):
    class Half(nn.Module):
        def forward(self, x, timesteps, text, return_dict=True):
            return (torch.full_like(x, 300.0, dtype=torch.float16),)  # its square overflows float16

    loss = denoising_loss(Half(), scheduler("epsilon"), *batch)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss).all()
