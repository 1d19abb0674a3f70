"""Tiny models to adapt, and the textbook formulas in float64 to hold them against."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from toy_models import Mlp
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

VECTORS = ("ether_u", "ether_v", "ether_u_out", "ether_v_out")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """These tensors are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Tiny(NamedTuple):
    model: nn.Module
    targets: list[str]
    run: Callable[..., Tensor]
    """Takes the model (bare, adapted or wrapped), returns its output on inputs that are always the same."""


def _mlp() -> Tiny:
    x = torch.randn(2, 5, 12)
    return Tiny(Mlp(), ["first", "second"], lambda model: model(x.to(_dtype(model))))


def _llama() -> Tiny:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,  # the default's logits are too flat to show an update
        attn_implementation="eager",
    )
    ids = torch.randint(0, 32, (2, 7))
    return Tiny(LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], lambda model: model(input_ids=ids).logits)


def _gpt2() -> Tiny:
    config = GPT2Config(
        vocab_size=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    ids = torch.randint(0, 32, (2, 7))
    return Tiny(GPT2LMHeadModel(config), ["c_attn", "mlp.c_proj"], lambda model: model(input_ids=ids).logits)


def _unet() -> Tiny:
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)

    def run(model: nn.Module, **kwargs: Any) -> Tensor:
        dtype = _dtype(model)
        return model(sample.to(dtype), 7, encoder_hidden_states=context.to(dtype), **kwargs).sample

    return Tiny(model, ["to_q", "to_k", "to_v", "to_out.0"], run)


_BUILDERS = {"mlp": _mlp, "llama": _llama, "gpt2": _gpt2, "unet": _unet}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for name, p in model.named_parameters() if not any(v in name for v in ("ether_", "lora_")))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], Tiny]:
    """A fresh model in eval mode by name: mlp, llama, gpt2 or unet. Two calls give equal weights."""

    def build(kind: str) -> Tiny:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = _BUILDERS[kind]()
        made.model.eval()
        return made

    return build


@pytest.fixture(scope="session")
def shake() -> Callable[..., None]:
    """Give every adapter parameter (or those whose name contains `only`) random values far from the start's."""

    def shake(model: nn.Module, only: str = "", seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(f"{vector}." in name for vector in VECTORS) and only in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))

    return shake


class Dense:
    """The formulas as the paper prints them, with every matrix built, in float64."""

    @staticmethod
    def side(u: Tensor, v: Tensor | None) -> Tensor:
        """H = I - 2 û ûᵀ, or H⁺ = I - û ûᵀ + v̂ v̂ᵀ, per block of u (n, d/n); (d, d)."""
        blocks = []
        for i in range(len(u)):
            u_hat = u[i].double() / u[i].double().norm()
            eye = torch.eye(len(u_hat), dtype=torch.float64)
            if v is None:
                blocks.append(eye - 2 * torch.outer(u_hat, u_hat))
            else:
                v_hat = v[i].double() / v[i].double().norm()
                blocks.append(eye - torch.outer(u_hat, u_hat) + torch.outer(v_hat, v_hat))
        return torch.block_diag(*blocks)

    @classmethod
    def update(
        cls, weight: Tensor, u: Tensor, v: Tensor | None, u_out: Tensor | None = None, v_out: Tensor | None = None
    ) -> Tensor:
        """H̃ W H - W, (out, in)."""
        weight = weight.double()
        changed = weight @ cls.side(u, v)
        if u_out is not None:
            changed = cls.side(u_out, v_out) @ changed
        return changed - weight

    @classmethod
    def forward(cls, x: Tensor, weight: Tensor, bias: Tensor | None, *vectors: Tensor | None) -> Tensor:
        """The arguments of ReflectedLinear."""
        y = x.double() @ (weight.double() + cls.update(weight, *vectors)).T
        return y if bias is None else y + bias.double()

    @classmethod
    def model(cls, base: nn.Module, adapted: nn.Module, scales: dict[str, float]) -> nn.Module:
        """A float64 copy of `base` with the scaled updates of the named adapters of `adapted` in its weights."""
        reference = copy.deepcopy(base).double()
        modules = dict(reference.named_modules())
        for name, layer in adapted.named_modules():
            if not hasattr(layer, "ether_u"):
                continue
            target = modules[name.removeprefix("base_model.model.")]
            transposed = isinstance(target, Conv1D)
            weight = target.weight.detach().T if transposed else target.weight.detach()
            total = weight.clone()
            for adapter, scale in scales.items():
                dicts = [getattr(layer, vector) for vector in VECTORS]
                if adapter in dicts[0]:
                    vectors = [d[adapter].detach() if adapter in d else None for d in dicts]
                    total += scale * cls.update(weight, *vectors)
            with torch.no_grad():
                target.weight.copy_(total.T if transposed else total)
        return reference


@pytest.fixture(scope="session")
def dense() -> type[Dense]:
    return Dense


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """‖actual - reference‖ / ‖reference‖ in float64."""

    def error(actual: Tensor, reference: Tensor) -> float:
        actual, reference = actual.detach().double(), reference.detach().double()
        return float((actual - reference).norm() / reference.norm().clamp_min(1e-300))

    return error
