"""`--dry-run`: everything is checked, no weight is read, and the run's size, memory and time are said."""

from etherdiff.config import TrainConfig
from etherdiff.eval.best import find_scorer
from etherdiff.system.devices import DTYPES, resolve_device
from etherdiff.system.terminal import say
from etherdiff.tasks import plan_training
from etherdiff.train.loop import optimizer_state_bytes
from etherdiff.use.inspection import measure_throughput, training_estimate


def dry_run(config: TrainConfig) -> None:
    """Plan the run and print what it would take. UserError as the run itself would raise."""
    task = plan_training(config, find_scorer=find_scorer)
    plan, config = task.plan, task.plan.config
    dtype = DTYPES[config.mixed_precision]
    say(f"Nothing is wrong: {config.method} on {plan.base.name}, {task.describe_data()}")
    if config.method == "none":  # no adapter, so nothing of the UNet to count
        say_lines(task.dry_lines())
        return
    estimate = training_estimate(
        plan.base,
        config.method,
        plan.options,
        resolution=plan.resolution,
        batch_size=task.images_per_pass(),
        gradient_checkpointing=config.gradient_checkpointing,
        weight_bytes=dtype.itemsize,
        optimizer_bytes=optimizer_state_bytes(config),
    )
    device = resolve_device(config.device)
    say(f"  trainable parameters  {estimate['trainable_parameters']:,}")
    say_lines(task.dry_lines())
    if estimate["step_flops"] is None:
        say(f"  memory and time       unknown: {estimate['note']}")
        return
    seconds = estimate["step_flops"] * config.gradient_accumulation * config.steps / measure_throughput(device, dtype)
    say(f"  memory                {size(estimate['total'])}")
    for part in ("weights", "trainable_and_optimizer", "activations"):
        say(f"    {part.replace('_', ' '):<24} {size(estimate[part])}")
    say(f"  compute               {estimate['step_flops'] / 1e9:,.1f} GFLOP per step")
    say(f"  time on this {device:<9} at least {duration(seconds)} for {config.steps} steps, at its speed in matrix products")


def say_lines(lines: list[str]) -> None:
    """Each on a line of its own, indented."""
    for line in lines:
        say(f"  {line}")


def size(count: float) -> str:
    """Bytes as a person says them."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
