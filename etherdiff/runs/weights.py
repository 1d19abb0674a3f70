"""What a run did to the weights of its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from etherdiff.adapters.drift import LayerDrift, adapter_drift, full_drift
from etherdiff.adapters.io import FULL, load_adapter, load_adapters, merge_adapter, read_adapter
from etherdiff.adapters.methods import TARGETS
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, fingerprint, load_base
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError


def refuse_other_base(run: Run, base: Base, hashes: Mapping[str, str] | None = None) -> None:
    """UserError where a base holds other weights than the run was trained on. `hashes` is its fingerprint, if known."""
    now = fingerprint(base) if hashes is None else hashes
    recorded = run.provenance.base.fingerprint
    if changed := sorted(name for name in recorded if recorded[name] != now.get(name)):
        raise UserError(f"{run.path} was trained on other weights than {base.name} holds now: {', '.join(changed)}")


def find_local_base(run: Run) -> Base:
    """Find the base where the run found it, without a download. UserError where it is gone or holds other weights."""
    place = Path(run.provenance.base.path or run.config.base)
    is_there = place.is_absolute() and place.exists()
    if not is_there and run.config.base != "tiny" and not Path(run.config.base).exists():
        raise UserError("its base is no longer where the run found it")
    base = find_base(str(place) if is_there else run.config.base, run.config.prediction_type)
    recorded, now = run.provenance.base.fingerprint, fingerprint(base)
    if any(now.get(part) != sha256 for part, sha256 in recorded.items()):
        raise UserError("its base holds other weights now")
    return base


def count_trained(run: Run) -> int:
    """Count the trained numbers of the run's adapters; the control encoder is not counted, as in the paper."""
    if not run.adapters and run.config.method != "none":
        raise UserError("it has no adapter")
    return sum(read_adapter(folder).trained_parameters() for folder in run.adapters)


def measure_drift(run: Run) -> dict[str, LayerDrift]:
    """Measure how far each layer has moved from the base; of magnitudes, with the adapter that they were learned on."""
    if len(run.adapters) > 1:
        return full_drift(*merged_weights(run))
    unet, saved = load_local_unet(run), read_adapter(run.folder.adapter)
    if saved.peft_type == FULL:
        return full_drift(unet.state_dict(), saved.tensors())
    return adapter_drift(load_adapter(unet, saved.folder))


def merged_weights(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The targeted layers' weights (out, in) in the base and in what the run made of it."""
    unet = load_local_unet(run)
    before = {name: weight.clone() for name, weight in _targeted(unet, run).items()}
    adapted = load_adapters(unet, [(folder, 1.0) for folder in run.adapters])
    return before, _targeted(merge_adapter(adapted), run)


def load_local_unet(run: Run) -> Any:
    """Load the base's UNet as the run found it. UserError where it is not there any more, or nothing was trained yet."""
    if not run.adapters and run.config.method != "none":
        raise UserError("it has no adapter")
    return load_base(find_local_base(run)).unet


def _targeted(unet: nn.Module, run: Run) -> dict[str, Tensor]:
    endings = tuple(f".{ending}" for ending in TARGETS[run.config.targets])
    linear = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight": layer.weight.detach() for name, layer in linear.items() if f".{name}".endswith(endings)}
