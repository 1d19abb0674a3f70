"""What the tests of scores are built from: small random-weight networks, and images."""

import json

import numpy as np
import transformers
from PIL import Image
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel

SIZE = 32
VIT_PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def save(model, folder, preprocessor):
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def clip_model(context=24):
    text = {"vocab_size": 49408, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={**text, **ends, "max_position_embeddings": context},
            vision_config={**vision, "image_size": SIZE, "patch_size": 8},
            projection_dim=12,
        )
    )


def pillow_processor(folder):
    """The folder's image processor, in the version that resizes with Pillow."""
    is_old = int(transformers.__version__.split(".")[0]) < 5
    return AutoImageProcessor.from_pretrained(folder, **({"use_fast": False} if is_old else {"backend": "pil"}))


def draw(path, number, size=(40, 36)):
    """A PNG of coarse noise that only `number` decides."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def black(path):
    Image.new("RGB", (40, 36)).save(path)
    return path
