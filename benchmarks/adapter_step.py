"""What an adapter costs: forward + backward of Stable Diffusion 1.5's UNet, the methods alternating in one run.

    python benchmarks/adapter_step.py                                   # CPU, float32, 256 px, batch 1
    python benchmarks/adapter_step.py --device cuda --dtype bf16 --resolution 512 --batch 4

Weights are random (only the architecture counts) and shared by all contestants. Each round times every contestant once, so
a ratio compares neighbours in time; the table gives the median ratio with a 95% interval of the median.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from etherdiff.adapters.methods import ATTENTION, MethodOptions, add_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SD15_CONFIG = Path(__file__).parents[1] / "etherdiff/assets/sd15/unet/config.json"


class DenseEtherPlus(nn.Module):
    """ETHER+ as a textbook writes it: build H (in, in) and H̃ (out, out), multiply three matrices, apply the product."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.u, self.v = self._pair(base.in_features)
        self.u_out, self.v_out = self._pair(base.out_features)

    @staticmethod
    def _pair(features: int) -> tuple[nn.Parameter, nn.Parameter]:
        u = torch.randn(features) / features**0.5
        return nn.Parameter(u), nn.Parameter(-u)

    @staticmethod
    def _transform(u: Tensor, v: Tensor) -> Tensor:
        u, v = F.normalize(u, dim=0), F.normalize(v, dim=0)
        return torch.eye(len(u), device=u.device) - torch.outer(u, u) + torch.outer(v, v)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight
        transforms = self._transform(self.u_out, self.v_out), self._transform(self.u, self.v)
        left, right = (t.to(weight.dtype) for t in transforms)
        return F.linear(x, left @ weight @ right, self.base.bias)


def freeze(unet: UNet2DConditionModel) -> None:
    """The floor: no adapter, gradient only to the first bias, so that backward still crosses the whole UNet."""
    unet.requires_grad_(False)
    unet.conv_in.bias.requires_grad_(True)


def make_dense(unet: UNet2DConditionModel) -> None:
    unet.requires_grad_(False)
    targets = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(ATTENTION)]
    for name in targets:
        unet.set_submodule(name, DenseEtherPlus(unet.get_submodule(name)).to(unet.device))


def method(name: str, **options: int) -> Callable[[UNet2DConditionModel], object]:
    return lambda unet: add_adapter(unet, name, MethodOptions(**options))  # type: ignore[arg-type]


CONTESTANTS: dict[str, Callable[[UNet2DConditionModel], object]] = {
    "frozen UNet": freeze,
    "LoRA r=4 (PEFT)": method("lora", rank=4),
    "ETHER": method("ether"),
    "ETHER+ n=1": method("ether+"),
    "ETHER+ n=4": method("ether+", blocks=4),
    "ETHER+ one-sided": method("ether+one-sided"),
    "OFT n=4 (PEFT)": method("oft"),
    "HRA r=2 (PEFT)": method("hra", rank=2),
    "dense ETHER+": make_dense,
}
FROZEN, LORA, ETHER, ETHER_PLUS = list(CONTESTANTS)[:4]


def build_unets(names: list[str], device: str, dtype: torch.dtype) -> dict[str, UNet2DConditionModel]:
    """One UNet per contestant, all on the same weight tensors."""
    config = json.loads(SD15_CONFIG.read_text())
    torch.manual_seed(0)
    weights = UNet2DConditionModel.from_config(config).to(device=device, dtype=dtype).state_dict()
    unets = {}
    for name in names:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        unet.load_state_dict(weights, assign=True)
        CONTESTANTS[name](unet)
        unets[name] = unet.to(device).train()
    return unets


def make_batch(batch: int, resolution: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, resolution // 8, resolution // 8, generator=generator)
    text = torch.randn(batch, 77, 768, generator=generator)
    return latents.to(device, dtype), torch.full((batch,), 500, device=device), text.to(device, dtype)


def step(unet: UNet2DConditionModel, batch: tuple[Tensor, Tensor, Tensor], scale: float = 1.0) -> None:
    """One forward and backward of a mean-squared loss; `scale` varies it so that nothing can be cached."""
    (unet(*batch, return_dict=False)[0].float() * scale).square().mean().backward()
    for parameter in unet.parameters():
        parameter.grad = None


@contextmanager
def counting_saved_bytes(unet: nn.Module) -> Iterator[list[int]]:
    """Collects the bytes that autograd keeps for backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    seen: dict[int, int] = {}
    keep = []  # a storage freed and handed out again would be counted once only

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(seen.values()))


def saved_bytes(unet: UNet2DConditionModel, batch: tuple[Tensor, Tensor, Tensor]) -> int:
    with counting_saved_bytes(unet) as total:
        loss = unet(*batch, return_dict=False)[0].float().square().mean()
    del loss
    return total[0]


def timed(unet: UNet2DConditionModel, batch: tuple[Tensor, Tensor, Tensor], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(unet, batch)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """A distribution-free interval of the median: the narrowest symmetric pair of order statistics that covers it."""
    ordered, n = sorted(values), len(values)
    # P(median lies between the k-th smallest and k-th largest) under a fair binomial
    weights = np.array([np.prod([(n - i) / (i + 1) for i in range(k)]) for k in range(n + 1)]) / 2.0**n
    k = 0
    while 1 - 2 * weights[: k + 2].sum() >= confidence and k + 1 < n / 2:
        k += 1
    return ordered[k], ordered[-1 - k]


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> dict[str, float]:
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    low, high = median_interval(ratios)
    return {"median": median(ratios), "low": low, "high": high}


def measure(unets: dict[str, UNet2DConditionModel], batch: tuple[Tensor, Tensor, Tensor], rounds: int, device: str) -> dict:
    memory = {name: saved_bytes(unet, batch) for name, unet in unets.items()}
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    for name in unets:
        step(unets[name], batch)  # warm-up
    gc.disable()
    for index in track(range(rounds), description="alternating", transient=True):
        names = list(unets) if index % 2 == 0 else list(unets)[::-1]  # a drift of speed hits both directions alike
        for name in names:
            seconds[name].append(timed(unets[name], batch, device))
        gc.collect()
    rows = {}
    for name, unet in unets.items():
        trainable = sum(p.numel() for p in unet.parameters() if p.requires_grad)
        rows[name] = {"trainable_parameters": trainable, "seconds": seconds[name], "saved_bytes": memory[name]}
        rows[name] |= {f"ratio_to_{key}": ratio(seconds, name, to) for key, to in (("lora", LORA), ("frozen", FROZEN))}
    if ETHER in rows and ETHER_PLUS in rows:
        rows[ETHER]["ratio_to_ether_plus"] = ratio(seconds, ETHER, ETHER_PLUS)
    return rows


def show(rows: dict, title: str) -> None:
    table = Table(title=title)
    for column in ("", "trainable", "step s", "/ LoRA r=4", "/ frozen", "saved MB", "saved / LoRA"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, row in rows.items():
        lora, frozen = row["ratio_to_lora"], row["ratio_to_frozen"]
        table.add_row(
            name,
            f"{row['trainable_parameters']:,}",
            f"{median(row['seconds']):.3f}",
            f"{lora['median']:.3f} [{lora['low']:.3f}, {lora['high']:.3f}]",
            f"{frozen['median']:.3f} [{frozen['low']:.3f}, {frozen['high']:.3f}]",
            f"{row['saved_bytes'] / 1e6:.2f}",
            f"{row['saved_bytes'] / rows[LORA]['saved_bytes']:.4f}",
        )
    Console(width=130).print(table)
    if "ratio_to_ether_plus" in rows.get(ETHER, {}):
        r = rows[ETHER]["ratio_to_ether_plus"]
        print(f"ETHER / ETHER+ n=1: {r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--resolution", type=int, default=256, help="image pixels; latents are an eighth")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="alternations; each times every contestant once")
    parser.add_argument("--only", nargs="*", help=f"contestants besides the frozen UNet and LoRA: {list(CONTESTANTS)}")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    names = [n for n in CONTESTANTS if not options.only or n in (FROZEN, LORA) or n in options.only]
    unets = build_unets(names, options.device, DTYPES[options.dtype])
    batch = make_batch(options.batch, options.resolution, options.device, DTYPES[options.dtype])
    rows = measure(unets, batch, options.rounds, options.device)
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "only")}
    settings |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    show(
        rows,
        f"SD 1.5 UNet, {options.dtype}, {options.device}, batch {options.batch}, {options.resolution} px, "
        f"{options.rounds} alternations, median [95% interval]",
    )
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
