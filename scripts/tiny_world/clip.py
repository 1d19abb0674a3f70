"""tiny-clip: how well a picture and a caption go together. A CLIPModel trained with the contrastive loss on scenes."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from etherdiff.tiny.world import KINDS
from tiny_world.cards import parameter_count, write_card
from tiny_world.data import LABELS, SceneSet, scene_set, to_tensor
from tiny_world.evaluator import NORMALISATION, evaluator_folder, in_batches, soften, some
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=1_200, learning_rate=1e-3, warmup=100, weight_decay=0.05, ema=0.99, evaluate_every=300)
BATCH = 128
SCENES, HELD_OUT = 60_000, 2_020
OTHERS = 100  # captions that the right one is found among
FORM_SHARES = (0.65, 0.2, 0.15)  # full, loose and short captions in a batch
LABEL_WEIGHT = 1.0
MAX_SCALE = float(np.log(100))


class Training(nn.Module):
    """The CLIPModel, and a head that reads labels from its pictures: with it a short training finds the things sooner."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.labels = nn.Linear(clip.config.vision_config.hidden_size, len(LABELS))


def build(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Train (or go on), score on the test split and write OUTPUT/clip; the tokenizer is OUTPUT/sd/tokenizer."""
    tokens_folder = output / "sd" / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(tokens_folder)
    scenes = scene_set("train", max(round(SCENES * min(fraction, 1)), BATCH), work)
    tokens = [tokenize(tokenizer, texts) for texts in (scenes.captions, scenes.loose_captions, scenes.short_captions)]
    validation = scene_set("validation", HELD_OUT // 2, work)
    with seeded():
        untrained = Training(make_model(tokenizer))
    schedule = SCHEDULE.shortened(fraction)
    trained: Any = train(
        "clip",
        untrained,
        lambda rng: draw_batch(rng, scenes, tokens),
        lambda model, *batch: contrastive_loss(model, batch),
        schedule,
        work,
        lambda model: retrieval(model.clip, tokenizer, validation),
    )
    model = trained.clip.eval()
    scores = retrieval(model, tokenizer, scene_set("test", HELD_OUT, work))
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **NORMALISATION)
    with evaluator_folder(model, processor, output / "clip") as folder:
        shutil.copytree(tokens_folder, folder, dirs_exist_ok=True)
        write_card(
            folder,
            "tiny-clip",
            "How well a caption fits a picture of etherdiff's tiny world, for CLIP scores. The tokenizer is tiny-sd's.",
            "CLIPModel: ViT of patch 8 on 64 px pictures, causal text transformer of 77 positions",
            parameter_count(model),
            f"{len(scenes.images):,} scenes, each with its full, its loose or its short caption",
            f"{schedule.steps:,} steps of {BATCH} pairs: contrastive loss, and labels of the picture by a head not kept",
            {
                f"Full caption of a test scene found among {OTHERS} others (picture to text, top 1)": scores["full_top1"],
                f"The same for text to picture (top 1 among {OTHERS} other pictures)": scores["full_text_to_image_top1"],
                "Short caption (one thing), top 1 as above; another's often fits as well": scores["short_top1"],
                "Short caption scored above one that names a kind that is not there": scores["short_over_false"],
            },
        )


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The untrained model: 2.4M parameters with a vocabulary of 2,000."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    text = {"hidden_size": 144, "intermediate_size": 432, "num_hidden_layers": 3, "num_attention_heads": 3}
    vision = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 3}
    return CLIPModel(
        CLIPConfig(
            text_config={**text, **special, "vocab_size": len(tokenizer), "projection_dim": 128},
            vision_config={**vision, "image_size": 64, "patch_size": 8, "projection_dim": 128},
            projection_dim=128,
            attn_implementation="eager",  # torch's fused attention is slow backwards on a CPU
        )
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> NDArray[np.int64]:
    """(N, length of the longest); what follows a caption's end is the end token again, which the model does not look at."""
    ids = tokenizer(texts, truncation=True, max_length=77)["input_ids"]
    rows = np.full((len(ids), max(map(len, ids))), tokenizer.eos_token_id, np.int64)
    for row, values in zip(rows, ids, strict=True):
        row[: len(values)] = values
    return rows


def draw_batch(rng: np.random.Generator, scenes: SceneSet, tokens: list[NDArray[np.int64]]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (B, 3, 64, 64), token ids (B, L) of captions of mixed forms, and labels (B, len(LABELS))."""
    chosen = some(rng, len(scenes.images), BATCH)
    forms = rng.choice(len(tokens), len(chosen), p=FORM_SHARES)
    rows = [tokens[form][index] for form, index in zip(forms, chosen, strict=True)]
    end = tokens[0][0, -1]
    length = 1 + max(int(np.argmax(row == end)) for row in rows)
    ids = np.stack([np.append(row, np.full(77, end))[:length] for row in rows])
    return soften(to_tensor(scenes.images[chosen]), rng), torch.from_numpy(ids), torch.from_numpy(scenes.labels[chosen]).float()


def contrastive_loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    """CLIP's loss with a learned temperature, captions that read the same counting as one; and that of the labels."""
    images, ids, labels = batch
    seen, read = model.clip.vision_model(images).pooler_output, model.clip.text_model(ids).pooler_output
    image = F.normalize(model.clip.visual_projection(seen).float(), dim=-1)
    text = F.normalize(model.clip.text_projection(read).float(), dim=-1)
    logits = model.clip.logit_scale.clamp(max=MAX_SCALE).exp() * image @ text.T
    same = (ids[:, None] == ids[None]).all(-1).float()
    right = same / same.sum(1, keepdim=True)
    contrast = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    return contrast + LABEL_WEIGHT * F.binary_cross_entropy_with_logits(model.labels(seen).float(), labels)


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, scenes: SceneSet) -> dict[str, float]:
    """Shares of scenes whose own caption (or picture) is the best of 101, over groups of that many scenes."""
    image = in_batches(lambda x: model.visual_projection(model.vision_model(x).pooler_output), scenes.images)
    image = F.normalize(image, dim=-1)
    full, short = (_embed_texts(model, tokenizer, texts) for texts in (scenes.captions, scenes.short_captions))
    groups = range(0, len(image) - OTHERS, OTHERS + 1)
    hits: dict[str, list[Tensor]] = {"full_top1": [], "full_text_to_image_top1": [], "short_top1": []}
    own = torch.arange(OTHERS + 1)
    for start in groups:
        part = slice(start, start + OTHERS + 1)
        texts = np.array(scenes.short_captions[part])
        hits["full_top1"].append((image[part] @ full[part].T).argmax(1) == own)
        hits["full_text_to_image_top1"].append((full[part] @ image[part].T).argmax(1) == own)
        best = (image[part] @ short[part].T).argmax(1).numpy()
        hits["short_top1"].append(torch.from_numpy(texts[best] == texts))
    scores = {name: float(torch.cat(values).float().mean()) for name, values in hits.items()}
    return {**scores, "short_over_false": _short_over_false(image @ short.T, scenes)}


def _short_over_false(similarity: Tensor, scenes: SceneSet) -> float:
    """Over all scenes and captions that name a kind which is not in the scene: how often the own caption scores higher."""
    there = torch.from_numpy(np.asarray(scenes.labels)[:, [LABELS.index(kind) for kind in KINDS]]).bool()
    named = [next(i for i, kind in enumerate(KINDS) if text.endswith(f" {kind}")) for text in scenes.short_captions]
    false = ~there[:, named]
    return float((similarity.diagonal()[:, None] > similarity)[false].float().mean())


def _embed_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    parts = torch.from_numpy(tokenize(tokenizer, texts)).split(256)
    return F.normalize(torch.cat([model.text_projection(model.text_model(ids).pooler_output) for ids in parts]), dim=-1)
