"""`etherdiff demo`: train, draw, score, merge and export on the tiny world, then print what to look at and what to type."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from etherdiff.config import DreamBoothConfig, ExportOptions, MergeOptions, SubjectEvalOptions
from etherdiff.eval.evaluate import evaluate
from etherdiff.eval.metrics import HELD_OUT
from etherdiff.families.diffusion import sheet, slug
from etherdiff.images.reading import list_images, read_image
from etherdiff.images.writing import contact_sheet
from etherdiff.runs.folder import RunFolder
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import say
from etherdiff.tasks.image_sets import IMAGES
from etherdiff.tasks.subject_sets import BASE_IMAGES
from etherdiff.tasks.subjects import make_prompts, prompts_for
from etherdiff.tiny.things import SUBJECTS
from etherdiff.tiny.world import render_folder
from etherdiff.use.export import export_run
from etherdiff.use.merge import merge_run

SUBJECT = "toadstool"
METHOD = "ether+"
STEPS = 300
BATCH_SIZE = 4
LEARNING_RATE = 0.02  # this and the weighting were chosen on validation subjects
IDENTIFIER = "sks"
SHOWN = (1, 8, 12, 17)  # of the 25 prompts: a ground, a sky, both, company
SEEDS = 2  # images of each prompt: with more, the demo takes over five minutes
ENLARGED = 3  # times, on the sheet


def run_demo(
    output: Path,
    train: Callable[[DreamBoothConfig], Path],
    report: Callable[[Path], None],
    steps: int = STEPS,
    denoising_steps: int = 25,
) -> None:
    """Train ETHER+ on a subject of the tiny world, draw and score what it learned, merge and export, all under `output`.

    Args:
        train: makes the run folder of a configuration, as `etherdiff.run.train` does.
        report: writes the run's report, as `etherdiff.report.show_report` does.
    """
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: {output} is not empty; choose another folder with --output")
    photos = output / "subject"
    render_folder(SUBJECT, photos)
    run = train(
        DreamBoothConfig(
            base="tiny",
            method=METHOD,
            subject=str(photos),
            class_noun=SUBJECTS[SUBJECT].class_noun,
            identifier=IDENTIFIER,
            class_sampling_steps=denoising_steps,
            output=output / "run",
            steps=steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            debiased_estimation=True,
            checkpoint_every=max(steps // 2, 1),
            eval_every=max(steps // 4, 1),
        )
    )
    result = evaluate(Run.open(run), SubjectEvalOptions(num=SEEDS, steps=denoising_steps))
    report(run)
    after, before = (found["scores"]["dino" + HELD_OUT]["mean"] for found in (result, result["base"]))
    before_after(run, photos).save(output / "before-after.png")
    proof = merge_run(run, MergeOptions(output=output / "merged"))
    lora_file = output / "lora.safetensors"
    lora = export_run(run, ExportOptions(output=lora_file, format="kohya"))
    say("\nLook at", style="bold")
    for path, what in (
        (output / "before-after.png", f"{METHOD} beside its base, which is asked for the same without {IDENTIFIER!r}"),
        (run / "report.html", f"open it in a browser; likeness (DINO) to held-out photos {after:.2f}, the base's {before:.2f}"),
        (output / "merged", f"a plain diffusers pipeline; it differs by {proof['max_abs_difference']:.1e} at most"),
        (lora_file, f"the adapter as an exact LoRA of rank {lora['rank']}, named as ComfyUI and WebUI want it"),
    ):
        say(f"  {path}   {what}")
    say("\nNext, on Stable Diffusion 1.5 and your own photos", style="bold")
    say("  etherdiff train-dreambooth --subject photos --class-noun dog --mixed-precision bf16 --output runs/dog")
    say("  etherdiff eval runs/dog")
    say("  etherdiff merge runs/dog --output merged")


def before_after(run: Path, photos: Path) -> Image.Image:
    """Draw the subject's photos above a few prompts, as the base and as the run draw them at the same seeds."""
    noun = SUBJECTS[SUBJECT].class_noun
    prompts = make_prompts(prompts_for(noun, tiny=True), IDENTIFIER, noun)
    rows = []
    for number in SHOWN:
        before = RunFolder(run).eval / BASE_IMAGES / f"{number:03d}-{slug(prompts[number].plain)}"
        after = RunFolder(run).eval / IMAGES / f"{number:03d}-{slug(prompts[number].text)}"
        rows.append([*_enlarged(before), *_enlarged(after)])
    columns = [f"{who}, seed {seed}" for who in ("the base", METHOD) for seed in range(SEEDS)]
    below = sheet(rows, [prompts[number].text for number in SHOWN], columns)
    learned_from = _enlarged(photos)
    above = contact_sheet(learned_from, len(learned_from), ["learned from these"])
    whole = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "white")
    whole.paste(above, (whole.width - above.width, 0))
    whole.paste(below, (0, above.height))
    return whole


def _enlarged(folder: Path) -> Sequence[Image.Image]:
    images = [read_image(path) for path in list_images(folder)]
    return [image.resize((ENLARGED * image.width, ENLARGED * image.height), Image.Resampling.NEAREST) for image in images]
