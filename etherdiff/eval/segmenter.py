"""The network that says of which class each pixel is: an UperNet, or any other segmentation model of transformers."""

import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING, AutoConfig, AutoModelForSemanticSegmentation

from etherdiff.eval.backbones import find_source
from etherdiff.eval.from_transformers import FromFolder, Source
from etherdiff.eval.network import Pixels, stacked
from etherdiff.system.errors import UserError

SEGMENTERS = {"paper": "openmmlab/upernet-convnext-large", "tiny": "tiny:upernet"}
"""Preset -> what judges segmentation maps. The paper says UperNet on ADE20K, but not which: this is a published one."""
OTHER = ("other", "others", "background", "unlabeled", "unlabelled", "void", "ignore")
"""Names of a first class that stands for "none of the others"."""


class Segmenter(FromFolder):
    """Images to class indices. `preprocessing` prepares them; where the model counts "other" as class 0, it is left out."""

    load = AutoModelForSemanticSegmentation.from_pretrained
    feature = "class of each pixel: logits scaled bilinearly to the map, argmax over the dataset's classes"
    largest_batch = 16
    """Images per forward pass; more are split."""

    def __init__(self, source: Source, classes: Sequence[str], device: str) -> None:
        """classes: the dataset's, in the order of its indices. UserError where the network's are not these."""
        self.classes = len(classes)
        self.skipped = _outputs_before(source, _read_outputs(source), classes)
        """Outputs before the dataset's first class: 1 where the network counts "other" as class 0, else 0."""
        if self.skipped:
            self.feature += ", the first output left out"
        super().__init__(source, device)
        if self.preprocessing.crop is not None:
            raise UserError(f"{source.name} cuts the middle out of an image, so it cannot judge a whole map")

    @torch.inference_mode()
    def segment(self, pixels: Pixels, resolution: int) -> Tensor:
        """uint8 (B, 3, h, w) of `preprocessing.pixels` to int64 (B, resolution, resolution), 0 to classes - 1, on the CPU.

        An image whose logits are not finite has -1 everywhere.
        """
        batch = self.preprocessing.normalize(stacked(pixels, self.device))
        parts = [self._classes(part, resolution) for part in batch.split(self.largest_batch)]
        return torch.cat(parts).cpu()

    def _classes(self, batch: Tensor, resolution: int) -> Tensor:
        logits = self.model(pixel_values=batch).logits.float()
        if logits.shape[1] != self.classes + self.skipped:
            raise UserError(f"{self.source.name} gives {logits.shape[1]} classes, but its configuration says otherwise")
        finite = torch.isfinite(logits).flatten(1).all(1)
        # as mmsegmentation does: the logits are scaled to the map, never the map to the logits
        logits = F.interpolate(logits[:, self.skipped :], (resolution, resolution), mode="bilinear", align_corners=False)
        return torch.where(finite[:, None, None], logits.argmax(1), -1)


def load_segmenter(spec: str, classes: Sequence[str], device: str) -> Segmenter:
    """The network that `spec` names: a hub id (with @REVISION), a local folder, or tiny:upernet.

    Raises:
        UserError: it is not there, segments nothing, or has other classes than the dataset.
    """
    return Segmenter(find_source("segmenter", spec), classes, device)


def _read_outputs(source: Source) -> list[str]:
    """The names of the network's classes, as its configuration has them; LABEL_0, LABEL_1, … where it has none."""
    try:
        config = AutoConfig.from_pretrained(str(source.folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.name} is no transformers model: {str(error).splitlines()[0]}") from error
    if type(config) not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        raise UserError(f"{source.name} is a {config.model_type} model, which does not segment: name an UperNet or SegFormer")
    return [str(config.id2label[index]) for index in range(config.num_labels)]


def _outputs_before(source: Source, outputs: Sequence[str], classes: Sequence[str]) -> int:
    """How many of the network's classes come before the dataset's first, 0 or 1.

    `do_reduce_labels` of the image processor says that the network was trained on maps whose 0 ("other") had been taken out,
    as in ADE20K's challenge: then its class 0 is the map's 1, which is the dataset's 0, and nothing comes before.
    """
    has_other = _plain(outputs[0]) in OTHER and _plain(classes[0]) != _plain(outputs[0])
    told = f"{source.name} has {len(outputs)} classes (the first is {outputs[0]!r}), and the dataset {len(classes)}"
    if len(outputs) == len(classes) + 1 and _reduces_labels(source):
        raise UserError(f"{told}: its image processor takes 'other' out of maps, so it should have as many as the dataset")
    if len(outputs) == len(classes) + 1 and has_other:
        return 1
    if len(outputs) != len(classes):
        raise UserError(f"{told}: name a segmenter that was trained on this dataset's classes")
    if has_other:
        raise UserError(f"{told}: it counts 'other' as class 0 and so lacks one of the dataset's")
    named, wanted = [_plain(name) for name in outputs], [_plain(name) for name in classes]
    if named != wanted and sorted(named) == sorted(wanted):
        raise UserError(f"{source.name} has the dataset's classes in another order")
    return 0


def _plain(name: str) -> str:
    """A class's first name: ADE20K's "building, edifice" is "building" elsewhere."""
    return name.partition(",")[0].partition(";")[0].strip().lower()


def _reduces_labels(source: Source) -> bool:
    """What the image processor did to maps in training; `reduce_labels` is the option's name of old."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = source.folder / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config = config.get("image_processor", config)
            return bool(config.get("do_reduce_labels", config.get("reduce_labels", False)))
    return False
