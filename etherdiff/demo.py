"""`etherdiff demo`: the whole job on the tiny base, ending with what to look at and what to type next."""

from pathlib import Path

from etherdiff.config import DreamBoothConfig
from etherdiff.errors import UserError
from etherdiff.export import export_adapter, merge_to_folder
from etherdiff.generate import GenerateOptions, generate, run_source
from etherdiff.run import train_dreambooth
from etherdiff.tiny.subject import draw_subject
from etherdiff.ui import say

STEPS = 200


def run_demo(output: Path) -> None:
    """Train ETHER+ on five drawings of a ball, sample along the way, generate, merge and export, all under `output`."""
    if output.exists() and any(output.iterdir()):
        raise UserError(f"output: {output} is not empty; choose another folder with --output")
    draw_subject(output / "subject")
    run = train_dreambooth(
        DreamBoothConfig(
            base="tiny",
            method="ether+",
            subject=str(output / "subject"),
            class_noun="ball",
            class_images=10,
            output=output / "run",
            steps=STEPS,
            batch_size=4,
            checkpoint_every=STEPS // 2,
            eval_every=STEPS // 4,
            sample_every=STEPS // 2,
        )
    )
    source = run_source(run)
    prompts = ["a photo of sks ball", "a photo of sks ball in the snow"]
    sheet = generate(source, GenerateOptions(prompts, output / "pictures"))
    proof = merge_to_folder(source.base, [(path, 1.0) for path in source.adapters], output / "merged")
    lora = export_adapter(source.base, source.adapters[0], output / "ether.safetensors", "kohya")
    say("\nLook at", style="bold")
    say(f"  {sheet}   what the adapter draws")
    say(f"  {run / 'samples' / f'step-{STEPS:06d}.png'}   the base above, the adapter below")
    say(f"  {run / 'metrics.jsonl'}   the loss, and the validation loss every {STEPS // 4} steps")
    say(f"  {output / 'merged'}   a plain diffusers pipeline; it differs by {proof['max_abs_difference']:.1e} at most")
    say(f"  {lora['path']}   the adapter as an exact LoRA of rank 4")
    say("Next, on Stable Diffusion 1.5 and your own photos:")
    say("  etherdiff train-dreambooth --subject photos/ --class-noun dog --mixed-precision bf16 --output runs/dog")
