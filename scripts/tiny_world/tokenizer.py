"""tiny-sd's tokenizer: CLIP's byte-pair encoding with only its commonest merges and those that the tiny world's words need.

What CLIP's 49,408 tokens spell, these 1,600 spell as well, in more pieces where a word is rare; the words of the tiny
world and of DreamBooth's prompts stay the single tokens they are in CLIP, and so does the identifier `sks`.
"""

import itertools
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from etherdiff.families.bases import shipped_config
from etherdiff.tasks.subjects import LIVE_PROMPTS, OBJECT_PROMPTS, SUBJECT_CLASSES
from etherdiff.tiny.world import PROMPTS, render_scene

COMMON_MERGES = 900
SCENES = 400  # whose captions show the world's words
START, END = "<|startoftext|>", "<|endoftext|>"
Merge = tuple[str, str]


def write_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and the two configurations, as Stable Diffusion 1.5 has them."""
    source = shipped_config("sd15") / "tokenizer"
    lines = (source / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
    numbers = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    letters = sorted(numbers, key=numbers.__getitem__)[:512]  # 256 bytes, and the same as ends of words
    kept = keep_merges(merges, world_words())
    tokens = [*letters, *("".join(merge) for merge in kept), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, folder / name)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in kept), ""]), encoding="utf-8")


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> NDArray[np.uint16]:
    """Token ids (N, 77), padded as the pipeline pads them."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return np.array(tokenizer(list(captions), **options)["input_ids"], np.uint16)


def world_words() -> set[str]:
    """The words of the captions, of all the prompts a subject is judged by, and the identifier."""
    texts = [caption for i in range(SCENES) for caption in _captions(i)]
    templates = (*OBJECT_PROMPTS, *LIVE_PROMPTS, *PROMPTS)
    texts += [template.format(identifier="sks", class_noun="") for template in templates] + list(SUBJECT_CLASSES.values())
    return set(re.findall(r"[a-z]+", " ".join(texts).lower()))


def _captions(index: int) -> tuple[str, str, str]:
    scene = render_scene("train", index)
    return scene.caption, scene.loose_caption, scene.short_caption


def keep_merges(merges: list[Merge], words: Iterable[str]) -> list[Merge]:
    """CLIP's first merges, and all that it goes through for these words, in CLIP's order: so these words stay as in CLIP."""
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    kept = set(range(COMMON_MERGES)).union(*(_ranks_used(word, ranks) for word in words))
    return [merges[rank] for rank in sorted(kept)]


def _ranks_used(word: str, ranks: dict[Merge, int]) -> set[int]:
    """The ranks of the merges that byte-pair encoding applies to a word: the lowest among its pairs, again and again."""
    parts = [*word[:-1], word[-1] + "</w>"]
    used: set[int] = set()
    while candidates := [ranks[pair] for pair in itertools.pairwise(parts) if pair in ranks]:
        best = min(candidates)
        at = next(i for i, pair in enumerate(itertools.pairwise(parts)) if ranks.get(pair) == best)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
        used.add(best)
    return used
