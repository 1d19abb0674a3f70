import json

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from etherdiff.families.sd1 import save_text_encoder, text_encoder_state_dict


def tiny_config():
    return CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=2,
    )


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_under_the_names_of_transformers_4_and_reloaded_bit_for_bit(tmp_path, kind, dtype):
    torch.manual_seed(0)
    model = kind(tiny_config()).to(dtype).eval()
    save_text_encoder(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    names = {key for key in keys if not key.startswith("text_projection.")}
    assert all(key.startswith("text_model.") and not key.startswith("text_model.text_model.") for key in names)
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in keys
    assert "text_model.embeddings.token_embedding.weight" in keys

    loaded, report = kind.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [kind.__name__]
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_the_model_itself_is_left_alone(tmp_path):
    model = CLIPTextModel(tiny_config())
    before = model.config.to_dict()
    save_text_encoder(model, tmp_path)
    assert model.config.to_dict() == before


def test_names_of_transformers_4_are_kept():
    class Renamed(CLIPTextModel):
        def state_dict(self):
            return {"text_model.embeddings.position_ids": 0, "text_model.final_layer_norm.bias": 1}

    assert text_encoder_state_dict(Renamed(tiny_config())) == {"text_model.final_layer_norm.bias": 1}
