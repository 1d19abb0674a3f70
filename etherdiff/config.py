"""Every command's options, each with its unit, default and bounds; they are read from recipes, --set and flags.

The descriptions are the command line's help. Nothing heavy is imported: names that belong to a registry (metrics, networks)
are checked where the registry is.
"""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from etherdiff.system.errors import UserError
from etherdiff.system.text import expand_home, read_user_text

MethodName = Literal["ether", "ether+", "ether+one-sided", "lora", "oft", "naive", "boft", "hra", "vera", "full"]
S2IMethodName = Literal[MethodName, "none"]
PerturbMethodName = Literal["ether", "ether+", "ether+one-sided", "oft", "naive"]
SignalName = Literal[
    "segmentation", "canny", "landmarks", "depth", "hed", "lineart", "lineart-anime", "mlsd", "normal", "openpose", "pidi"
]
TargetName = Literal["attention", "attention+geglu", "attention+feedforward"]
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)
PERTURB_METHOD_NAMES: tuple[str, ...] = get_args(PerturbMethodName)
TARGET_NAMES: tuple[str, ...] = get_args(TargetName)
NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError)  # all raised by PyYAML
MAX_RECIPE_BYTES = 1_000_000
PLAINER = {"Input should be": "must be", "greater than or equal to": "at least", "less than or equal to": "at most"}
"""pydantic's words -> plainer words."""
GUIDE_CONTROL = "apply guidance to the control as well (drop the hint in the unconditional pass)"
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
T = TypeVar("T")
C = TypeVar("C", bound="Options")


def _split_commas(value: Any) -> Any:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _within_seeds(first: Any, count: int) -> None:
    """Raise ValueError where a later image's seed would be too large. first: the first image's; None where that is wrong."""
    if isinstance(first, int) and first + count > 2**63:
        raise ValueError(f"the last image's seed would be beyond 2^63: with {count} images the seed is at most {2**63 - count}")


SPLIT_COMMAS = BeforeValidator(_split_commas, json_schema_input_type=str | list[str])
Listed = Annotated[T, SPLIT_COMMAS]
"""Names, also as one text with commas between them."""
PathOrName = Annotated[str, Path]
"""Text that may be a path: as in fields of paths, `~` at its beginning is the home folder."""


class Options(BaseModel):
    """Common base of every command's options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("must not hold a NUL character")  # no path has one, and nobody types it
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _expand_home(cls, value: Any, field: ValidationInfo) -> Any:
        return expand_home(value) if _may_be_path(cls.model_fields[str(field.field_name)]) else value


def _may_be_path(field: FieldInfo) -> bool:
    def parts(annotation: Any) -> Iterator[Any]:
        yield annotation
        for part in get_args(annotation):
            yield from parts(part)

    return Path in [*parts(field.annotation), *field.metadata]


# --- Recipes ---------------------------------------------------------------------------------------------------------


class AdapterConfig(Options):
    """Options of every run folder: an adapter of some method on a base."""

    base: PathOrName = Field("sd15", description="Stable Diffusion 1.x/2.x: sd15, sd21, tiny, hub id, folder or .safetensors")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="what the base predicts [default: as its scheduler says; a 2.x single file: v_prediction]"
    )
    output: Path | None = Field(None, description="run folder to create [default: runs/SUBJECT-METHOD]")
    method: S2IMethodName = Field("ether+", description=f"how to fine-tune: {', '.join(METHOD_NAMES)}")
    targets: TargetName = Field("attention", description=f"linear layers of the UNet to adapt: {', '.join(TARGET_NAMES)}")
    blocks: int | None = Field(None, ge=1, description="diagonal blocks n [default: 1 for ether, 4 for oft and naive]")


class SubjectConfig(AdapterConfig):
    """Options of every run that is judged by how it draws a subject."""

    subject: PathOrName = Field(description="folder of images, or a subject's name under the data root or in google/dreambooth")
    data_root: Path | None = Field(None, description="folder that holds dreambooth/NAME [default: $ETHERDIFF_DATA]")
    identifier: str = Field("sks", min_length=1, description="the word that comes to mean the subject")
    class_noun: str | None = Field(None, min_length=1, description="what the subject is [default: DreamBooth's own noun]")

    @field_validator("subject", "identifier", "class_noun")
    @classmethod
    def _is_named(cls, name: str | None) -> str | None:
        if name is not None and not name.strip():
            raise ValueError("must not be empty")
        return name


class TrainConfig(AdapterConfig):
    """Options of every training task."""

    rank: int | None = Field(None, ge=1, description="rank of lora (4), hra (8) and vera (256)")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the adapter's update")

    steps: int = Field(1200, ge=1, description="optimizer steps")
    learning_rate: float | None = Field(None, gt=0, description="peak learning rate [default: the method's in the paper]")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="course of the learning rate")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps over which the learning rate rises to its peak")
    batch_size: int = Field(1, ge=1, description="images per process and forward pass, class images not counted")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes per optimizer step")
    optimizer: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit needs etherdiff[8bit] and a GPU")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of Adam's second moment")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR loss weighting, usually 5 [default: off]")
    debiased_estimation: bool = Field(False, description="loss weighted by 1/sqrt(SNR): high noise counts more")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="moving average of the adapter, saved as the result")
    caption_dropout: float = Field(0.0, ge=0, lt=1, description="probability of training on the empty prompt")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="precision of the frozen model and autocast")
    gradient_checkpointing: bool = Field(False, description="recompute activations: about half the memory, a third slower")
    device: DeviceName = Field("auto", description="where to compute")
    seed: int = Field(0, ge=0, lt=2**63, description="everything random follows from it")

    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep: int | None = Field(None, ge=1, description="newest checkpoints to keep; best/ is never removed [default: all]")
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="a step whose loss or gradient is NaN or infinite: stop or skip"
    )
    eval_every: int = Field(200, ge=1, description="steps between validation losses and scores (fixed noise, prompts, seeds)")
    sample_every: int | None = Field(None, ge=1, description="steps between sample images [default: none]")
    sample_count: int = Field(4, ge=1, description="sample images (of each prompt, where there are prompts)")
    tracker: Literal["tensorboard", "wandb", "none"] = Field("tensorboard", description="where curves are logged")
    overwrite: bool = Field(False, description="replace an existing run folder")
    dry_run: bool = Field(False, description="check everything, print size, memory and time, and stop")

    @field_validator("debiased_estimation")
    @classmethod
    def _is_one_weighting(cls, wanted: bool, others: ValidationInfo) -> bool:
        if wanted and others.data.get("min_snr_gamma") is not None:
            raise ValueError("weighs the loss as min_snr_gamma does: give one of them")
        return wanted

    @field_validator("mixed_precision", mode="before", json_schema_input_type=Literal["no", "fp16", "bf16", False])
    @classmethod
    def _no_is_no_boolean(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads a bare `no` so


class DreamBoothConfig(SubjectConfig, TrainConfig):
    """Subject-driven fine-tuning (Ruiz et al. 2023; protocol of the ETHER paper, section 5.1)."""

    method: MethodName = Field("ether+", description=f"how to fine-tune: {', '.join(METHOD_NAMES)}")
    sample_prompts: tuple[str, ...] | None = Field(None, description="what to sample; repeat for several")
    eval_scores: Literal["auto", "on", "off"] = Field(
        "auto", description="DINO and CLIP-T along the way, and best/; auto: where the networks need no download"
    )
    prior_preservation: bool = Field(True, description="train on images of the class as well, so that it is not forgotten")
    prior_weight: float = Field(1.0, gt=0, description="weight of the class images' loss")
    class_images: int | None = Field(
        None,
        ge=1,
        description="images of the class; the base generates and caches them [default: 200 as the paper, 20 for tiny]",
    )
    class_sampling_steps: int = Field(25, ge=1, description="denoising steps per class image (DPM-Solver++, guidance 7.5)")
    resolution: int | None = Field(None, ge=1, description="side of the training images in pixels [default: the base's]")
    crop: Literal["center", "random"] = Field("center", description="window cut from images that are not square")
    cached_crops: int = Field(8, ge=1, description="random crops per image that are drawn from")
    flip: bool = Field(False, description="mirror half of the samples")
    skip_bad: bool = Field(False, description="leave unreadable images out instead of stopping")

    @field_validator("eval_scores", mode="before", json_schema_input_type=Literal["auto", "on", "off"] | bool)
    @classmethod
    def _on_and_off_are_no_booleans(cls, value: Any) -> Any:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value  # YAML reads a bare `on` so

    @property
    def crops_per_image(self) -> int:
        """Number of windows of each image that are encoded."""
        return self.cached_crops if self.crop == "random" else 1


class S2IConfig(TrainConfig):
    """Controllable generation: a control image says where things are (protocol of the ETHER paper, section 5.2)."""

    method: S2IMethodName = Field(
        "ether+", description=f"how to fine-tune: {', '.join(METHOD_NAMES)}, or none: the control encoder alone"
    )
    targets: TargetName = Field("attention+geglu", description=f"linear layers of the UNet to adapt: {', '.join(TARGET_NAMES)}")
    steps: int = Field(20_000, ge=1, description="optimizer steps; 2,000 are one pass over ADE20K")
    batch_size: int = Field(10, ge=1, description="images per process and forward pass")
    output: Path | None = Field(None, description="run folder to create [default: runs/DATASET-METHOD]")
    dataset: PathOrName = Field(description="ade20k, celebahq-landmarks, coco-canny, tiny, or a folder with metadata.jsonl")
    data_root: Path | None = Field(None, description="folder that holds the datasets by name [default: $ETHERDIFF_DATA]")
    signal: SignalName | None = Field(
        None, description=f"what a folder's control files are: {', '.join(get_args(SignalName))} [default: the dataset's]"
    )
    palette: PathOrName | None = Field(None, description="colours of a folder's label maps: ade20k, tiny or a JSON file")
    captions: Path | None = Field(None, description="JSON-lines file of captions, where they are not with the dataset")
    make_captions: bool = Field(False, description="have BLIP write the captions that are missing, once")
    encoder_init: Literal["scaled", "paper"] = Field(
        "scaled", description="the control encoder's first weights: scaled learns control soon, paper is torch's default"
    )
    encoder_learning_rate: float | None = Field(
        None, gt=0, description="of the control encoder [default: the adapter's, at most 1e-4]"
    )
    refit: Path | None = Field(
        None, description="finished run whose result is kept while a magnitude per output neuron is learned on top (for oft)"
    )
    resolution: int | None = Field(None, ge=1, description="side of the training images in pixels [default: the base's]")
    flip: bool = Field(False, description="mirror half of the samples, image and control together")

    @field_validator("dataset")
    @classmethod
    def _is_named(cls, name: str) -> str:
        if not name.strip():
            raise ValueError("must not be empty")
        return name


class PerturbConfig(SubjectConfig):
    """A random transformation of every targeted layer, at a distance from the identity (ETHER paper, section 5.3)."""

    steps: ClassVar[int] = 0  # nothing is trained

    output: Path | None = Field(None, description="run folder to create [default: runs/SUBJECT-METHOD-random]")
    method: PerturbMethodName = Field("ether+", description=f"whose kind of matrix: {', '.join(PERTURB_METHOD_NAMES)}")
    targets: TargetName = Field("attention", description=f"linear layers of the UNet to transform: {', '.join(TARGET_NAMES)}")
    distance: float | None = Field(
        None, ge=0, description="‖T − I‖ of each block: 2 for ether, at most √2 for ether+ [default: 2 for ether; else needed]"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="the matrices follow from it")
    overwrite: bool = Field(False, description="replace an existing run folder")


RunConfig: TypeAlias = TrainConfig | PerturbConfig
"""Configuration in a run folder's run.yaml."""
TASK_CONFIGS: dict[str, type[RunConfig]] = {"dreambooth": DreamBoothConfig, "s2i": S2IConfig, "perturb": PerturbConfig}
"""Task's name in run.yaml -> options."""

# --- The other commands ----------------------------------------------------------------------------------------------


class ResumeOptions(Options):
    """Options of resuming a run."""

    steps: int | None = Field(None, ge=1, description="continue up to this many optimizer steps in all")
    on_nan: Literal["stop", "skip"] | None = Field(
        None, description="from here on, a step whose loss or gradient is NaN or infinite: stop or skip"
    )


class GenerateOptions(Options):
    """Options of drawing images."""

    output: Path = Field(description="folder for the images")
    run: Path | None = Field(None, description="run folder: its base and its adapter")
    base: PathOrName | None = Field(None, description="without a run: sd15, sd21, tiny, hub id, folder or .safetensors")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="what --base predicts [default: as its scheduler says; a 2.x single file: v_prediction]"
    )
    adapter: tuple[Path, ...] = Field(
        (), description="adapter folder or LoRA file (kohya, diffusers) for --base; repeat to add several"
    )
    prompt: tuple[str, ...] = Field((), description="what to draw; repeat for several")
    prompts: Path | None = Field(None, description="text file with a prompt per line; # begins a comment")
    num: int = Field(4, ge=1, description="images per prompt")
    batch_size: int = Field(4, ge=1, description="images drawn at once")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the first image; each further image adds 1")
    control: Path | None = Field(
        None, description="control file of a controllable run (label map, edges, landmarks), or a folder of them"
    )
    control_scale: float = Field(1.0, ge=-100, le=100, description="multiplies the hint of the control; 0 is no control")
    guide_control: bool = Field(False, description=GUIDE_CONTROL)
    steps: int | None = Field(None, ge=1, description="denoising steps [default: 25 of DPM-Solver++; with control 50 of DDIM]")
    guidance_scale: float | None = Field(
        None, ge=0, le=100, description="strength of the prompt [default: 7.5; with control 9]"
    )
    negative_prompt: str = Field("", description="what the images should not show")
    long_prompts: bool = Field(False, description="read prompts of more than 75 tokens whole, in parts, as the WebUIs do")
    resolution: int | None = Field(None, ge=1, description="side of the images in pixels [default: the base's]")
    scale: float = Field(1.0, ge=-100, le=100, description="multiplies the adapter's update; 0 is the base")
    device: DeviceName = Field("auto", description="where to compute: auto, cpu, cuda or mps")
    offload: bool = Field(False, description="move each model to the GPU only while it runs")
    overwrite: bool = Field(False, description="replace images made with other settings")

    @field_validator("seed")
    @classmethod
    def _has_seeds(cls, seed: int, others: ValidationInfo) -> int:
        _within_seeds(seed, others.data.get("num", 1))
        return seed


class EvalOptions(Options):
    """Options of scoring a run of any task."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of the first image of a prompt or set; each further image adds 1")
    batch_size: int = Field(4, ge=1, description="images drawn at once")
    device: DeviceName = Field("auto", description="where to compute: auto, cpu, cuda or mps")
    metrics: Listed[tuple[str, ...] | None] = Field(
        None, description="scores to compute, separated by commas [default: all for the task]"
    )
    preset: str | None = Field(None, description="networks to score with, paper or tiny [default: as the base]")
    backbone: tuple[str, ...] = Field(
        (),
        description="ROLE=NAME: another network for dino, clip, lpips, fid or segmenter (hub id or folder), "
        "or landmarks=FILE.task; repeat for several",
    )
    overwrite: bool = Field(False, description="replace images made with other settings")

    @field_validator("backbone")
    @classmethod
    def _expand_home_after_role(cls, backbone: tuple[str, ...]) -> tuple[str, ...]:
        parts = [text.partition("=") for text in backbone]
        return tuple(f"{role}{sign}{expand_home(name)}" for role, sign, name in parts)

    @property
    def named_backbones(self) -> dict[str, str]:
        """Role -> another network than the preset's."""
        return {role: name for role, _, name in (text.partition("=") for text in self.backbone)}


class SubjectEvalOptions(EvalOptions):
    """Options of scoring a run by how it draws a subject."""

    steps: int = Field(25, ge=1, description="denoising steps")
    prompts: Path | None = Field(
        None, description="text file with a prompt per line, identifier included [default: DreamBooth's 25]"
    )
    num: int = Field(4, ge=1, description="images per prompt")
    plain_clip_t: bool = Field(False, description="compute CLIP-T with the prompts without the identifier")
    checkpoint: str = Field("last", description="what to score: last (the result), best or step-N")
    base: bool = Field(True, description="draw and score the base's own images as well")

    @field_validator("num")
    @classmethod
    def _has_seeds(cls, num: int, others: ValidationInfo) -> int:
        _within_seeds(others.data.get("seed"), num)
        return num


class ControlEvalOptions(EvalOptions):
    """Options of scoring a controllable run."""

    steps: int = Field(50, ge=1, description="denoising steps")
    num_maps: int | None = Field(
        None, ge=1, description="maps to draw from [default: all of the evaluation split, at most 2000]"
    )
    guidance_scale: float = Field(9.0, ge=0, le=100, description="strength of the prompt")
    guide_control: bool = Field(False, description=GUIDE_CONTROL)
    shuffle_maps: bool = Field(False, description="also draw each prompt with another map, scored against its own")
    without_control: bool = Field(False, description="also draw without any map")
    real: bool = Field(False, description="also score the real images")


EVAL_OPTIONS: dict[str, type[EvalOptions]] = {
    "dreambooth": SubjectEvalOptions,
    "s2i": ControlEvalOptions,
    "perturb": SubjectEvalOptions,
}
"""Task's name in run.yaml -> options."""


class CompareOptions(Options):
    """Options of comparing scores."""

    anyway: bool = Field(False, description="also show scores that were not computed the same way, marked")
    markdown: bool = Field(False, description="print a Markdown table")


class ResultOptions(Options):
    """Common options of tables and figures."""

    paper: bool = Field(True, description="show the paper's numbers next to ours")
    anyway: bool = Field(False, description="also show scores that were not computed the same way, marked")


class TableOptions(ResultOptions):
    """Options of a table."""

    rows: Listed[tuple[str, ...]] = Field(
        ("method",), description="a row for each value of these: configuration keys, or subject; separated by commas"
    )
    columns: Listed[tuple[str, ...] | None] = Field(
        None, description="scores, and facts such as step_flops, separated by commas [default: the paper's]"
    )
    best: str | None = Field(
        None, description="a key: show for each row its best value by the first score, and the range of good values"
    )
    share: float | None = Field(
        None, gt=0, le=1, description="share of a row's best score that counts as good with --best [default: 0.9]"
    )
    format: Literal["text", "markdown", "csv", "html"] | None = Field(
        None, description="text, markdown, csv or html [default: from the ending of --output, else text]"
    )
    output: Path | None = Field(None, description="file to write instead of printing")


class PlotOptions(ResultOptions):
    """Options of a figure."""

    x: str = Field(description="a configuration key with numbers, such as learning_rate; or step")
    y: tuple[str, ...] = Field(description="a score or a fact; repeat for a panel each")
    output: Path = Field(description="the picture: a .png or .svg file")
    lines: Listed[tuple[str, ...]] = Field(("method",), description="a line for each value of these keys, separated by commas")
    title: str | None = Field(None, description="title above the picture")


class MergeOptions(Options):
    """Options of writing a run as a pipeline."""

    output: Path = Field(description="folder for the pipeline; must be empty or not exist")
    base: PathOrName | None = Field(None, description="without a run: sd15, sd21, tiny, hub id, folder or .safetensors")
    adapter: tuple[Path, ...] = Field(
        (), description="adapter folder or LoRA file (kohya, diffusers) for --base; repeat to add several"
    )
    scale: float = Field(1.0, ge=-100, le=100, description="multiplies the adapter's update")
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="precision of the UNet: fp32, fp16 or bf16")
    single_file: Path | None = Field(None, description="also write one .safetensors checkpoint, for WebUI and ComfyUI")


class ExportOptions(Options):
    """Options of writing a run's adapter for another tool."""

    output: Path = Field(description="file (.safetensors) or folder to write")
    format: Literal["kohya", "lora", "peft"] = Field(
        "kohya",
        description="kohya (one file for ComfyUI, A1111, Forge, sd-scripts, InvokeAI, diffusers and others), "
        "lora (diffusers' own key names, for diffusers and PEFT alone) or peft (folder)",
    )
    scale: float = Field(1.0, ge=-100, le=100, description="multiplies the adapter's update")


class InspectOptions(Options):
    """Options of counting methods on a base."""

    base: PathOrName = Field("sd15", description="sd15, sd21, tiny, hub id, folder or .safetensors; its weights are not read")
    task: Literal["dreambooth", "s2i"] = Field("dreambooth", description="dreambooth or s2i: decides the default targets")
    method: tuple[MethodName | Literal["magnitude"], ...] | None = Field(
        None, description="only these methods; repeat for several [default: all]"
    )
    targets: TargetName | None = Field(None, description="layers to adapt instead of the task's default")
    blocks: int | None = Field(None, ge=1, description="diagonal blocks, for the methods that have them")
    rank: int | None = Field(None, ge=1, description="rank, for the methods that have one")
    resolution: int | None = Field(
        None, ge=1, description="side in pixels at which FLOPs and memory are counted [default: the base's]"
    )
    batch_size: int = Field(1, ge=1, description="images for which FLOPs and memory are counted")


class CheckOptions(Options):
    """Options of checking a dataset."""

    data_root: Path | None = Field(None, description="folder that holds the datasets by name [default: $ETHERDIFF_DATA]")
    signal: SignalName | None = Field(
        None, description=f"{', '.join(get_args(SignalName))} [default: the dataset's; of a folder segmentation]"
    )
    palette: PathOrName | None = Field(
        None, description="colours of label maps: ade20k, tiny or a JSON file [default: the dataset's]"
    )
    captions: Path | None = Field(None, description="caption file, instead of the dataset's captions")


class DemoOptions(Options):
    """Options of the demo."""

    output: Path = Field(Path("demo"), description="folder for everything the demo makes")


# --- Sweeps ----------------------------------------------------------------------------------------------------------


class SweepOptions(Options):
    """Options of running a sweep."""

    output: Path | None = Field(None, description="folder of the whole sweep [default: sweeps/NAME of the file]")
    address: str | None = Field(None, description="Ray cluster, HOST:PORT or auto, to use instead of this machine")
    jobs: int | None = Field(None, ge=1, description="runs at a time, at most [default: as many as fit; 1 without Ray]")
    retries: int = Field(1, ge=0, description="further attempts for a run that failed")
    print_commands: bool = Field(False, description="run nothing: print a shell command per line, for SLURM arrays")
    dry_run: bool = Field(False, description="run nothing: check everything and print the state of each run")

    @field_validator("dry_run")
    @classmethod
    def _is_one_of_them(cls, wanted: bool, others: ValidationInfo) -> bool:
        if wanted and others.data.get("print_commands"):
            raise ValueError("give either --print-commands or --dry-run")
        return wanted


class Resources(Options):
    """Resources of each run of a sweep."""

    cpus: int = Field(1, ge=1, description="processor cores, and threads")
    gpus: float = Field(0, ge=0, description="GPUs, or a fraction of one")

    @field_validator("gpus")
    @classmethod
    def _shared_or_whole(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("must be a fraction of one, or a whole number")
        return gpus


SWEEP_OWN_KEYS = ("output", "overwrite", "dry_run")
"""Keys of a configuration that the sweep itself sets."""


class SweepFile(Options):
    """A sweep file as it is written."""

    task: str = Field(
        description="what is run: dreambooth, s2i or perturb", json_schema_extra={"enum": ["dreambooth", "s2i", "perturb"]}
    )
    recipe: PathOrName | None = Field(None, description="YAML file of options, relative to the sweep file")
    settings: dict[str, Any] = Field({}, description="options of all runs, over the recipe")
    grid: dict[str, list[Any]] = Field({}, description="option: list of values; every combination is run")
    runs: list[dict[str, Any]] = Field([{}], min_length=1, description="alternatives, each run with every combination")
    eval: dict[str, Any] | bool = Field({}, description="options of etherdiff eval; false: runs are not scored")
    resources: dict[str, Any] = Field({}, description="cpus and gpus of each run")


class SchemaOptions(Options):
    """Options of printing a schema."""

    task: Literal["dreambooth", "s2i", "perturb", "sweep"] = Field(
        "dreambooth", description="recipes of dreambooth, s2i or perturb, or sweep files"
    )
    output: Path | None = Field(None, description="file to write instead of printing")


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_config(cls: type[C], recipe: Path | None, settings: list[str], flags: dict[str, Any]) -> C:
    """Read the configuration from a recipe file, `key=value` settings and flags; the later win.

    Raises one UserError with everything that is wrong with them.
    """
    values = {} if recipe is None else read_recipe(recipe)
    problems = []
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            problems.append(f"--set {setting}: write it as key=value")
            continue
        values[key.strip()] = _yaml_value(text)
    values |= {key: value for key, value in flags.items() if value is not None}
    try:
        config = cls.model_validate(values)
    except ValidationError as error:
        raise UserError(problems + [_explain(cls, detail) for detail in error.errors()]) from None
    if problems:
        raise UserError(problems)
    return config


def load_run_config(cls: type[C], settings: dict[str, Any]) -> C:
    """Check options that were recorded or written in a file. UserError with everything that is wrong with them."""
    try:
        return cls.model_validate(settings)
    except ValidationError as error:
        raise UserError([_explain(cls, detail) for detail in error.errors()]) from None


def load_yaml(path: Path) -> Any:
    """Read a plain YAML file. UserError says what is wrong with it."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UserError(f"{path}: too large for a recipe ({path.stat().st_size:,} bytes)")
        return yaml.load(read_user_text(path), _PlainLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except NOT_YAML as error:
        raise UserError(f"{path}: is not valid YAML: {error}") from error


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the options in a recipe, a run folder's run.yaml being one. UserError if the file is none."""
    content = load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines")
    content.pop("provenance", None)
    return content


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases (a few lines of them expand to gigabytes) and without repeated keys (the first would be lost)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not allowed{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.YAMLError(f"{', '.join(repeated)} given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _yaml_value(text: str) -> Any:
    try:
        return yaml.load(text, _PlainLoader)
    except NOT_YAML:
        return text


def _explain(cls: type[BaseModel], detail: Any) -> str:
    """Translate one pydantic error into the names and words of our options."""
    name = ".".join(str(part) for part in detail["loc"])
    given = detail.get("input")
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name.replace("-", "_"), cls.model_fields, n=1)
        hint = f"; did you mean {close[0]}?" if close else f" (there are: {', '.join(sorted(cls.model_fields))})"
        return f"{name}: there is no such option{hint}"
    if detail["type"] == "missing":
        return f"{name}: is needed ({cls.model_fields[name].description})"
    message = detail["msg"].removeprefix("Value error, ")
    for words, plain in PLAINER.items():
        message = message.replace(words, plain)
    return f"{name}: {message}, not {_short(given)}"


def _short(value: Any, length: int = 80) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "that"
    return text if len(text) <= length else f"{text[:length]}…"
