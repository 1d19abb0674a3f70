"""Adapters on disk and on a UNet: save, load, scale, merge, and rewrite as LoRA factors. Knows nothing of pipelines.

An adapter is a folder in PEFT's format, and nothing in it is a pickle:

    adapter_config.json  adapter_model.safetensors (float32)  [base.json: the name and fingerprint of its base]

Full fine-tuning, which has no PEFT type, is stored alike: the type is FULL and the tensors are the UNet's own.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from etherdiff.adapters.layers import quiet_boft
from etherdiff.adapters.lora_files import base_of, read_lora, read_metadata
from etherdiff.adapters.methods import METHODS, adapter_layers, layer_types, method_of, peft_type_of, tuner_layers
from etherdiff.system.errors import UserError
from etherdiff.system.files import save_tensors, staged_folder
from etherdiff.system.text import listed

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PICKLE = "adapter_model.bin"
MODEL_CARD = "README.md"  # written by plain PEFT, not by us
FULL, MAGNITUDE = "FULL", "MAGNITUDE"

Factors = dict[str, tuple[Tensor, Tensor]]
"""Layer name -> down (r, in) and up (out, r), with up @ down the layer's weight update."""


# --- On disk ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder that has been found and whose configuration has been read; no tensor yet."""

    folder: Path
    config: dict[str, Any]
    base: dict[str, Any] | None
    """The base it was trained on, {"name": ..., "fingerprint": {...}}; None if it was not recorded."""

    @property
    def peft_type(self) -> str:
        return self.config["peft_type"]

    @property
    def method(self) -> str:
        """The method's name, as in `methods.METHODS` where it is one of those."""
        return method_of(self.config)

    @property
    def base_name(self) -> str:
        """Name of the base it was trained on, for messages."""
        name = self.base["name"] if self.base else self.config.get("base_model_name_or_path")
        return name or "a base that was not recorded"

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor of the adapter, on the CPU. UserError where the file is damaged."""
        try:
            return load_file(self.folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def trained_parameters(self) -> int:
        """Return how many numbers were trained, by the file's header. UserError where the file is damaged."""
        untrained = layer_types()[self.peft_type].untrained
        try:
            with safe_open(self.folder / WEIGHTS, "pt") as file:
                trained = [name for name in file.keys() if name.split(".")[-1] not in untrained]  # noqa: SIM118  no mapping
                return sum(math.prod(file.get_slice(name).get_shape()) for name in trained)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"{self.folder / WEIGHTS} is truncated or damaged ({error}): copy it again from where it was made, "
            "or save it again from a checkpoint."
        )


@dataclass(frozen=True)
class LoraFile(SavedAdapter):
    """A LoRA file of another program, or of `etherdiff export`; `folder` is its path."""

    metadata: dict[str, str]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Find an adapter in its folder, in a run's folder, or in a LoRA file, and check everything but its tensors.

    UserError says what is wrong with it and what would mend it.
    """
    if Path(folder).is_file():
        metadata = read_metadata(Path(folder))
        return LoraFile(Path(folder), {"peft_type": "LORA"}, base_of(metadata), metadata)
    folder = _find(Path(folder))
    config = _read_json(folder / CONFIG)
    if config.get("peft_type") not in layer_types():
        raise UserError(
            f"adapter {folder}: its type {config.get('peft_type')!r} is unknown here. "
            f"etherdiff reads {', '.join(sorted(layer_types()))}."
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(_no_weights(folder))
    base = _read_json(folder / BASE) if (folder / BASE).is_file() else None
    return SavedAdapter(folder, config, base)


def save_adapter(model: nn.Module, folder: str | Path, base: dict[str, Any] | None = None, name: str = "default") -> None:
    """Write the adapter `name` of `model`, or the whole UNet where that was trained, in PEFT's folder format.

    model: what `methods.add_adapter` or `load_adapter` returned. base: {"name": ..., "fingerprint": {...}}, recorded
    with the adapter. Tensors are float32. The folder is replaced as a whole; UserError where it holds something else.
    """
    folder = Path(folder).resolve()
    _refuse_foreign_files(folder)
    config, tensors = _contents(model, name)
    if base is not None:
        config["base_model_name_or_path"] = base["name"]
    with staged_folder(folder) as staged:
        _write_json(staged / CONFIG, config)
        if base is not None:
            _write_json(staged / BASE, base)
        tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
        save_tensors(tensors, staged / WEIGHTS)


def _contents(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration, ready for JSON, and the tensors of one adapter, or of the whole UNet."""
    if not isinstance(model, PeftModel):
        return {"peft_type": FULL, "auto_mapping": _model_class(model)}, model.state_dict()
    changes = {"inference_mode": True, "auto_mapping": _model_class(model.get_base_model())}
    # save_embedding_layers: its default asks the hub about the base
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return model.peft_config[name].to_dict() | changes, tensors


def _model_class(model: nn.Module) -> dict[str, str]:
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _refuse_foreign_files(folder: Path) -> None:
    """Refuse a folder that holds other files: an adapter's folder is replaced as a whole."""
    if folder.is_file():
        raise UserError(f"{folder} is a file: an adapter is saved as a folder.")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in held if name not in (CONFIG, WEIGHTS, BASE, MODEL_CARD)]
    if foreign:
        raise UserError(f"{folder} holds {listed(foreign, 8)}: choose a folder of its own for the adapter.")


def _find(folder: Path) -> Path:
    """Return the folder with the adapter's configuration: the one given, or `adapter/` in it, as in a run."""
    if not folder.is_dir():
        raise UserError(f"adapter {folder}: there is no such folder. Give a run's folder, or an adapter's.")
    for candidate in (folder, folder / "adapter"):
        if (candidate / CONFIG).is_file():
            return candidate
    inside = listed(sorted(path.name for path in folder.iterdir()), 8) or "nothing"
    raise UserError(
        f"adapter {folder} has no {CONFIG}, neither in itself nor in adapter/ (it holds {inside}). "
        "Give a run's folder, or the adapter folder inside it."
    )


def _no_weights(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"adapter {folder} holds {PICKLE}, a pickle, which can run code when opened, so etherdiff refuses it. "
            f'If you trust it, convert it there: python -c "import torch, safetensors.torch as s; s.save_file('
            f"torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')\""
        )
    return f"adapter {folder} has no {WEIGHTS}: it is incomplete; copy it again from where it was made."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the adapter again from where it was made.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: copy the adapter again from where it was made.")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    # default: PEFT keeps target_modules as a set, whose order changes from run to run
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=sorted) + "\n", encoding="utf-8")


# --- On a UNet -------------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", scale: float = 1.0, trainable: bool = False
) -> nn.Module:
    """Put a saved adapter on a UNet, in place, or one more of the same type on what an earlier call returned.

    scale multiplies the weight update. All adapters loaded are active. Returns a PeftModel, or the UNet itself for full
    fine-tuning. Whatever does not fit is a UserError, and leaves the model as it was.
    """
    saved = read_adapter(folder)
    _check_combination(model, saved, name, scale)
    if saved.peft_type == FULL:
        return _load_full(model, saved, scale).requires_grad_(trainable)
    tensors, config = _contents_for(saved, model)
    config.inference_mode = not trainable
    training = model.training
    adapted = _insert(model, config, name, saved)
    try:
        _check_fit(saved, tensors, get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    except UserError:
        _take_out(model, name)
        raise
    set_peft_model_state_dict(adapted, tensors, adapter_name=name)
    if scale != 1:
        for layer in tuner_layers(adapted).values():
            layer.set_scale(name, scale)
    _activate_all(adapted)
    return adapted.train(training)  # new layers are in training mode whatever the UNet is in, and would drop out


def load_adapters(unet: UNet2DConditionModel, adapters: Sequence[tuple[str | Path, float]]) -> nn.Module:
    """Put saved adapters, each with its scale, on a plain UNet, all active. Returns what `load_adapter` does.

    Re-fitted magnitudes scale what the adapters before them made of the weights: those are folded in first.
    """
    types = {read_adapter(folder).peft_type for folder, _ in adapters}
    if len(adapters) > 1 and FULL in types:
        raise UserError(
            "a fully fine-tuned UNet cannot be combined with another adapter: merge it into a base of its own first "
            "(`etherdiff merge`), and load the other on that."
        )
    model: Any = unet
    for index, (folder, scale) in enumerate(adapters):
        if index and read_adapter(folder).peft_type == MAGNITUDE and _peft_types(model) != {MAGNITUDE}:
            model = merge_adapter(model)
        model = load_adapter(model, folder, f"default_{index}" if index else "default", scale)
    return model


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters on `model`, in the order of loading; none on a plain or fully fine-tuned UNet."""
    return list(_configs(model))


def merge_adapter(model: nn.Module) -> UNet2DConditionModel:
    """Return the plain UNet with the updates of all active adapters folded into its weights, in place, frozen.

    Nothing of PEFT stays on it, so that `save_pretrained` writes the keys that everyone reads. UserError where an
    adapter holds NaN or infinity; the model is then half merged and cannot be used.
    """
    if isinstance(model, PeftModel):
        names = model.active_adapters
        if layer_types()[peft_type_of(model.peft_config[names[0]])].merges_backwards:
            names = names[::-1]
        try:
            unet = model.merge_and_unload(safe_merge=True, adapter_names=names)
        except ValueError as error:
            raise UserError(f"the adapter cannot be merged: {error}. Take an earlier checkpoint of it.") from error
    else:
        unet = model
    if any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
        raise ValueError("give what load_adapter or add_adapter returned: this UNet carries an adapter inside")
    _forget_peft(unet)
    return unet.requires_grad_(False)


def _check_combination(model: nn.Module, saved: SavedAdapter, name: str, scale: float) -> None:
    others = _peft_types(model) - {saved.peft_type}
    if others:
        raise UserError(
            f"adapter {saved.folder} ({saved.method}) cannot be combined with one of type {', '.join(sorted(others))}: "
            "merge one of them into the base first (`etherdiff merge`), and load the other on the result."
        )
    if name in adapter_names(model):
        raise ValueError(f"the model has an adapter named {name!r} already")
    if not isinstance(model, PeftModel) and tuner_layers(model):
        raise ValueError("give what the first load_adapter returned: this UNet carries an adapter inside")
    if scale != 1 and not layer_types()[saved.peft_type].is_scalable:
        *scalable, last = (name for name, method in METHODS.items() if method.layer.is_scalable)
        raise UserError(
            f"adapter {saved.folder}: {saved.method} has no scale, so {scale:g} cannot be applied; it works at 1 only. "
            f"{', '.join(scalable)} and {last} can be scaled."
        )


def _contents_for(saved: SavedAdapter, model: nn.Module) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the tensors by PEFT's names, and the configuration with which they go on the model."""
    if not isinstance(saved, LoraFile):
        return saved.tensors(), _peft_config(saved)
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    tensors, ranks = read_lora(saved.folder, saved.metadata, plain)
    rank = max(ranks.values())  # alpha is the rank everywhere, as the tensors hold the files' own
    return tensors, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks)


def _peft_config(saved: SavedAdapter) -> PeftConfig:
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[saved.peft_type]  # type: ignore[index]  # PEFT's enum is a string
    try:
        return cls.from_pretrained(str(saved.folder))
    except (ValueError, TypeError) as error:
        raise UserError(f"{saved.folder / CONFIG}: {error}") from error


def _insert(model: nn.Module, config: PeftConfig, name: str, saved: SavedAdapter) -> PeftModel:
    """Insert freshly initialised adapter layers, in place; the global random generator is left alone."""
    try:
        with torch.random.fork_rng(devices=[]), quiet_boft():
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                return model
            return PeftModel(model.requires_grad_(False), config, adapter_name=name)
    except Exception as error:  # each of PEFT's tuners raises its own for a layer it cannot take
        _take_out(model, name)
        raise UserError(f"adapter {saved.folder} does not fit this UNet: {error}. {_other_base(saved)}") from error


def _take_out(model: nn.Module, name: str) -> None:
    """Undo `_insert` of this adapter, also where it stopped half way."""
    if isinstance(model, PeftModel):
        model.peft_config.pop(name, None)
        for layer in tuner_layers(model).values():
            layer.delete_adapter(name)
        return
    for layer_name, layer in tuner_layers(model).items():
        model.set_submodule(layer_name, layer.get_base_layer())
    _forget_peft(model)


def _configs(model: nn.Module) -> dict[str, PeftConfig]:
    return dict(model.peft_config) if isinstance(model, PeftModel) else {}


def _peft_types(model: nn.Module) -> set[str]:
    return {peft_type_of(config) for config in _configs(model).values()}


def _forget_peft(unet: nn.Module) -> None:
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        unet.__dict__.pop(attribute, None)


def _check_fit(saved: SavedAdapter, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the file has exactly the tensors that belong on this UNet, in their shapes."""
    wrong_shapes = [
        f"{_layer(key)} is {tuple(tensors[key].shape)} in the file and {tuple(expected[key].shape)} here"
        for key in sorted(tensors.keys() & expected.keys())
        if tensors[key].shape != expected[key].shape
    ]
    unexpected = [_layer(key) for key in sorted(tensors.keys() - expected.keys())]
    missing = [_layer(key) for key in sorted(expected.keys() - tensors.keys())]
    found = {
        "tensors of another shape": wrong_shapes,
        "tensors for which there is no place": unexpected,
        "tensors missing from the file": missing,
    }
    problems = [f"{len(names)} {what} ({listed(names, 3)})" for what, names in found.items() if names]
    if problems:
        raise UserError(f"adapter {saved.folder} does not fit this UNet: {'; '.join(problems)}. {_other_base(saved)}")


def _layer(key: str) -> str:
    return key.removeprefix("base_model.model.")


def _other_base(saved: SavedAdapter) -> str:
    return f"It is an adapter for another base ({saved.base_name}), or its files do not belong together."


def _load_full(model: nn.Module, saved: SavedAdapter, scale: float) -> nn.Module:
    tensors, own = saved.tensors(), model.state_dict()
    _check_fit(saved, tensors, own)
    for key, weight in own.items():  # detached, and sharing the parameters' memory
        trained = tensors[key].to(weight.device)
        weight.copy_(trained if scale == 1 else torch.lerp(weight.float(), trained, scale))
    return model


def _activate_all(model: PeftModel) -> None:
    """Make every adapter active, and those trainable that were loaded so."""
    tuner: Any = model.base_model  # PeftModel.set_adapter takes one name only
    tuner.set_adapter(adapter_names(model), inference_mode=True)
    model.set_requires_grad([name for name, config in model.peft_config.items() if not config.inference_mode])


# --- As LoRA ---------------------------------------------------------------------------------------------------------


def refuse_inexact_lora(peft_type: str) -> None:
    """Raise UserError, with the reason and what to do instead, where an adapter's update has no exact form of low rank."""
    why = layer_types()[peft_type].why_no_lora
    if why is not None:
        raise UserError(
            f"an adapter of type {peft_type} cannot be exact as a LoRA, because {why}. "
            "Use `etherdiff merge` for a plain pipeline, or `etherdiff export --format peft` for the adapter itself."
        )


@torch.no_grad()
def lora_factors(model: nn.Module, name: str = "default") -> Factors:
    """Return the adapter's weight update of each layer as down (r, in) and up (out, r), float32, at its present scale.

    Exact, because the update is of that rank; r is at most min(in, out). For ETHER the factors hold only on the base
    weights they were computed from. UserError for methods whose update is not of low rank.
    """
    configs = _configs(model)
    refuse_inexact_lora(peft_type_of(configs[name]) if configs else FULL)
    _refuse_lora_extras(configs[name])
    return {key: _of_least_rank(*layer.lora_factors(name)) for key, layer in adapter_layers(model, name).items()}


def _refuse_lora_extras(config: PeftConfig) -> None:
    extras = ("use_dora", "lora_bias", "modules_to_save")
    used = [name for name in extras if getattr(config, name, None)]
    if used:
        raise UserError(
            f"the adapter uses PEFT's {', '.join(used)}, which a plain LoRA file cannot hold: use `etherdiff merge`, "
            "or `etherdiff export --format peft`."
        )


def _of_least_rank(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same product in float32; where r exceeds min(in, out), with an identity on the smaller side."""
    (rank, in_features), out_features = down.shape, len(up)
    if rank > min(in_features, out_features):
        product = up.double() @ down.double()
        if in_features <= out_features:
            down, up = torch.eye(in_features, device=down.device), product
        else:
            down, up = product, torch.eye(out_features, device=up.device)
    return down.float().contiguous(), up.float().contiguous()
