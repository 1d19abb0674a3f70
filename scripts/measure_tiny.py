"""How good the tiny models that come with etherdiff are, on test scenes that none of them was trained on (10 minutes).

python scripts/measure_tiny.py --guidance-scale 9 --json tiny_world.json
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tiny_world import clip, dino, features, upernet
from tiny_world.autoencoder import psnr
from tiny_world.data import scene_set, to_tensor
from tiny_world.judge import Judgement, judge
from transformers import AutoModel, AutoTokenizer, CLIPModel, ResNetForImageClassification, UperNetForSemanticSegmentation

from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import sample
from etherdiff.families.sd1 import load_base, make_pipeline
from etherdiff.system.files import ASSETS
from etherdiff.system.terminal import quiet_libraries, say, track
from etherdiff.tiny.world import Scene, render_scene

TINY = ASSETS / "tiny"


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="where to write the figures")] = None,
    work: Annotated[Path, typer.Option(help="where the rendered test scenes are kept")] = Path("build/tiny"),
    captions: Annotated[int, typer.Option(help="test captions to draw")] = 200,
    guidance_scale: Annotated[float, typer.Option(help="of the drawing")] = 7.5,
    split: Annotated[str, typer.Option(help="test; validation while choosing")] = "test",
) -> None:
    """Measure every tiny model and print the figures."""
    quiet_libraries()
    scenes = scene_set(split, 1_000, work)
    segmenter = UperNetForSemanticSegmentation.from_pretrained(TINY / "upernet").eval()
    figures: dict[str, object] = {"split": split, "guidance_scale": guidance_scale}
    with torch.no_grad():
        figures["autoencoder_psnr_db"] = psnr(load_base(find_base("tiny")).vae, scenes)
        figures["upernet"] = upernet.segmentation_scores(segmenter, scenes)
        figures["clip"] = clip.retrieval(
            CLIPModel.from_pretrained(TINY / "clip").eval(), AutoTokenizer.from_pretrained(TINY / "clip"), scenes
        )
        figures["dino"] = dino.triples(
            AutoModel.from_pretrained(TINY / "dino").eval(), dino.thing_views(split, dino.HELD_OUT, 2, work)
        )
        figures["features"] = features.label_scores(
            ResNetForImageClassification.from_pretrained(TINY / "features").eval(), scenes
        )
        figures["text_to_image"] = text_to_image(segmenter, [render_scene(split, i) for i in range(captions)], guidance_scale)
        figures["text_to_image_ceiling"] = ceiling(segmenter, [render_scene(split, i) for i in range(captions)])
    text = json.dumps(figures, indent=2)
    say(text)
    if json_file:
        json_file.write_text(text + "\n", encoding="utf-8")


def text_to_image(segmenter: UperNetForSemanticSegmentation, scenes: list[Scene], guidance_scale: float) -> dict[str, float]:
    """Draw each scene's full caption with its index as seed, and judge what the segmenter sees."""
    pipeline = make_pipeline(load_base(find_base("tiny")))
    judgements = []
    for index, scene in enumerate(track(scenes, "drawing test captions")):
        image = np.asarray(sample(pipeline, scene.caption, [index], 64, guidance_scale=guidance_scale)[0])
        judgements.append(_judge(segmenter, image, scene))
    return shares(judgements)


def ceiling(segmenter: UperNetForSemanticSegmentation, scenes: list[Scene]) -> dict[str, float]:
    """The same judgement of the rendered scenes themselves: what a perfect painter would score."""
    return shares(_judge(segmenter, scene.image, scene) for scene in scenes)


def _judge(segmenter: UperNetForSemanticSegmentation, image: np.ndarray, scene: Scene) -> Judgement:
    seen = segmenter(to_tensor(image[None])).logits.argmax(1)[0].numpy().astype(np.uint8)
    return judge(image, seen, scene.sky, scene.ground, scene.things)


def shares(judgements: Iterable[Judgement]) -> dict[str, float]:
    """Shares of pictures with the right sky and ground, and of things that are there and in their colours."""
    judgements = list(judgements)
    return {
        "sky": float(np.mean([j.sky for j in judgements])),
        "ground": float(np.mean([j.ground for j in judgements])),
        "kind": float(np.mean([there for j in judgements for there in j.kinds])),
        "colour": float(np.mean([right for j in judgements for right in j.colours])),
        "pictures": len(judgements),
    }


if __name__ == "__main__":
    typer.run(main)
