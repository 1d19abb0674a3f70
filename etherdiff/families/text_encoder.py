"""CLIP text encoders on disk, under the one set of key names that every transformers release loads."""

import copy
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from etherdiff.system.files import save_tensors

PREFIX = "text_model."


def text_encoder_state_dict(text_encoder: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a CLIPTextModel(WithProjection) as transformers 4 names them: `text_model.encoder.layers...`.

    transformers 5.6 and later name a CLIPTextModel's weights without the prefix. `position_ids`, a constant that
    old releases saved, is left out.
    """
    return {
        key if key.startswith((PREFIX, "text_projection.")) else PREFIX + key: value
        for key, value in text_encoder.state_dict().items()
        if not key.endswith("position_ids")
    }


def save_text_encoder(text_encoder: PreTrainedModel, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, as `save_pretrained` does but with transformers 4's key names.

    transformers 5's own names load in 4.x as random weights with only a warning; 5.x reads both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(text_encoder.config)
    config.architectures = [type(text_encoder).__name__]
    config.dtype = text_encoder.dtype
    config.save_pretrained(folder)
    save_tensors(text_encoder_state_dict(text_encoder), folder / "model.safetensors")
