"""The command line: parse, call, print. Nothing heavy is imported before a command runs."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin

import typer

from etherdiff import __version__
from etherdiff.system.errors import ProofError, RunError, Stopped, UserError
from etherdiff.system.signals import stop_signals

app = typer.Typer(
    name="etherdiff",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune Stable Diffusion with ETHER and ETHER+, and take the result to other tools.\n\n"
    "Start with [bold]etherdiff demo[/bold], or on your own photos:\n\n"
    "  etherdiff train-dreambooth --subject photos/ --class-noun dog --output runs/dog\n\n"
    "  etherdiff generate --run runs/dog --prompt 'a photo of sks dog on the beach' --output pictures",
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
PathsArgument = Annotated[
    list[Path], typer.Argument(metavar="PATH…", help="run folders, or folders that hold some, as a sweep's")
]
PaperOption = Annotated[bool, typer.Option("--paper/--no-paper", help="the paper's numbers beside")]
AnywayOption = Annotated[bool, typer.Option("--anyway", help="also scores that were not computed the same way, marked")]
CONTROLLED = "Controllable runs"
GUIDE_CONTROL = "let guidance strengthen the control too: what is steered away from is drawn without it"
PANELS = {  # the option that opens each panel of a training command's help
    "base": "Model and method",
    "steps": "Optimization",
    "mixed_precision": "Machine and randomness",
    "checkpoint_every": "Along the way",
    "sample_prompts": "Along the way",
    "prior_preservation": "Subject and images",
    "subject": "Subject and images",
    "distance": "Transformation",
    "dataset": "Images and control",
}


def training_command(config_class: type, description: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every field of a configuration class, its help being the field's description.

    Values stay text: the configuration checks them, so that all mistakes come in one message.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "flags"]
        options, panel = [], ""
        for name, field in config_class.model_fields.items():  # type: ignore[attr-defined]
            panel = PANELS.get(name, panel)
            annotation = Annotated[_option_type(field), _option(name, field, panel)]  # type: ignore[valid-type]
            options.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))

        def command(**given: Any) -> None:
            mine = {p.name: given.pop(p.name) for p in own}
            function(**mine, flags=given)

        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature([*keyword_only, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*keyword_only, *options]}
        command.__doc__ = description
        return command

    return decorate


def _option_type(field: Any) -> Any:
    if field.annotation is bool:
        return Optional[bool]  # noqa: UP045  typer reads this form on every version
    return Optional[list[str]] if _is_list(field.annotation) else Optional[str]  # noqa: UP045


def _is_list(annotation: Any) -> bool:
    return any(get_origin(part) is tuple for part in (annotation, *get_args(annotation)))


def _option(name: str, field: Any, panel: str) -> Any:
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{name.replace('_', '-')}"] if field.annotation is bool else [flag]
    said = field.description
    if not field.is_required() and field.default is not None and field.annotation is not bool:
        said += f" [default: {field.default}]"
    if field.annotation is bool and field.default:
        said += " [default: on]"
    said = said.replace("[", "\\[")  # not markup
    return typer.Option(*names, help=said, metavar=_metavar(field.annotation), rich_help_panel=panel, show_default=False)


def _metavar(annotation: Any) -> str | None:
    if annotation is bool:
        return None
    parts = [part for part in (get_args(annotation) or (annotation,)) if part is not type(None)]
    literals = [value for value in parts if isinstance(value, str)] or list(get_args(parts[0]))
    if literals and all(isinstance(value, str) for value in literals):
        return "|".join(literals) if len("|".join(literals)) < 30 else "NAME"
    return {int: "N", float: "X", Path: "PATH"}.get(parts[0], "TEXT")


def _read_config(config_class: type, config: Path | None, settings: list[str] | None, flags: dict[str, Any]) -> Any:
    from etherdiff.config import read_config

    return read_config(config_class, config, settings or [], flags)


def _dreambooth_config() -> type:
    from etherdiff.config import DreamBoothConfig

    return DreamBoothConfig


def _s2i_config() -> type:
    from etherdiff.config import S2IConfig

    return S2IConfig


def _perturb_config() -> type:
    from etherdiff.config import PerturbConfig

    return PerturbConfig


ConfigOption = Annotated[Path | None, typer.Option("--config", help="recipe: a YAML file of options (a run's run.yaml is one)")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one option over the recipe's")]


@app.command("train-dreambooth", rich_help_panel="Train")
@training_command(
    _dreambooth_config(),
    "Teach the base one subject from a few photos (DreamBooth), with an adapter of a few hundred kilobytes.",
)
def train_dreambooth(config: ConfigOption = None, settings: SetOption = None, *, flags: dict[str, Any]) -> None:
    """See `training_command`."""
    settled = _read_config(_dreambooth_config(), config, settings, flags)
    if settled.dry_run:
        from etherdiff.use.dryrun import dry_run

        dry_run(settled)
        return
    from etherdiff import run

    _say_next(run.train_dreambooth(settled))


@app.command("train-s2i", rich_help_panel="Train")
@training_command(
    _s2i_config(),
    "Teach the base to follow a control image (semantic map, Canny edges, face landmarks): an adapter and a small encoder.",
)
def train_s2i(config: ConfigOption = None, settings: SetOption = None, *, flags: dict[str, Any]) -> None:
    """See `training_command`."""
    settled = _read_config(_s2i_config(), config, settings, flags)
    if settled.dry_run:
        from etherdiff.use.dryrun import dry_run

        dry_run(settled)
        return
    from etherdiff import run

    _say_next(run.train_s2i(settled))


@app.command(rich_help_panel="Train")
def resume(
    run: RunArgument,
    steps: Annotated[int | None, typer.Option(min=1, help="go on to this many steps in all")] = None,
    on_nan: Annotated[str | None, typer.Option(help="from here on, a step that gives NaN: stop or skip")] = None,
) -> None:
    """Go on with a run that was stopped, from its newest whole checkpoint; or extend a finished one with --steps."""
    if on_nan not in (None, "stop", "skip"):
        raise UserError(f"on_nan: must be stop or skip, not {on_nan!r}")
    _relaunch_as_begun(run)
    from etherdiff.run import resume as resume_run

    _say_next(resume_run(run, steps, on_nan))


@app.command(rich_help_panel="Train")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file that says which runs; see configs/sweeps/")],
    output: Annotated[
        Path | None, typer.Option(help="folder for all of it [default: sweeps/NAME of the file]".replace("[", "\\["))
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use, HOST:PORT or auto, instead of this machine")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="most runs at a time [default: as many as fit; 1 without Ray]".replace("[", "\\["))
    ] = None,
    retries: Annotated[int, typer.Option(help="how often a run that failed is tried again")] = 1,
    commands: Annotated[
        bool, typer.Option("--print-commands", help="run nothing: print a shell command per line, for SLURM arrays")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="run nothing: check everything and say how far each run is")] = False,
) -> None:
    """Make and score many runs from one file: those that are finished are skipped, those that were stopped go on."""
    from etherdiff.sweeps import sweep as s

    options = s.SweepOptions(output, address, jobs, retries)
    if commands and dry:
        raise UserError("give either --print-commands or --dry-run")
    if commands or dry:
        for line in s.print_commands(file, options) if commands else s.dry_run(file, options):
            typer.echo(line)
        return
    s.run_sweep(file, options)


@app.command(rich_help_panel="Use the result")
def generate(
    output: Annotated[Path, typer.Option(help="folder for the images")],
    run: Annotated[Path | None, typer.Option(help="run folder: its base and its adapter")] = None,
    base: Annotated[str | None, typer.Option(help="without a run: sd15, sd21, tiny, hub id, folder, .safetensors")] = None,
    adapter: Annotated[list[Path] | None, typer.Option(help="adapter folder for --base; repeat to add several up")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; repeat for several")] = None,
    prompts: Annotated[Path | None, typer.Option(help="text file with a prompt per line")] = None,
    num: Annotated[int, typer.Option(help="images per prompt")] = 4,
    batch_size: Annotated[int, typer.Option(help="images drawn at once")] = 4,
    seed: Annotated[int, typer.Option(help="seed of the first image; the next ones count up")] = 0,
    control: Annotated[
        Path | None, typer.Option(help="of a controllable run: a control file (label map, edges, landmarks), or a folder")
    ] = None,
    control_scale: Annotated[float, typer.Option(help="multiplies the hint of the control; 0 is no control")] = 1.0,
    guide_control: Annotated[bool, typer.Option("--guide-control", help=GUIDE_CONTROL)] = False,
    steps: Annotated[
        int | None,
        typer.Option(help="denoising steps [default: 25 of DPM-Solver++; with control 50 of DDIM]".replace("[", "\\[")),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="strength of the prompt [default: 7.5; with control 9]".replace("[", "\\["))
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="what to steer away from")] = "",
    resolution: Annotated[int | None, typer.Option(help="side in pixels [default: the base's]".replace("[", "\\["))] = None,
    scale: Annotated[float, typer.Option(help="multiplies the adapter's update; 0 is the base")] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    offload: Annotated[bool, typer.Option(help="keep on the GPU only what computes just now")] = False,
) -> None:
    """Draw images of prompts with a run's adapter (or any adapters on a base), each with its settings inside."""
    from etherdiff.families.sampling import PAPER_SAMPLING, S2I_SAMPLING
    from etherdiff.use import generate as g

    if (run is None) == (base is None):
        raise UserError("give either --run, or --base (with --adapter)")
    if run is not None and adapter:
        raise UserError("--adapter goes with --base; a run brings its own")
    usual = S2I_SAMPLING if control else PAPER_SAMPLING
    wanted = [*(prompt or []), *(g.read_prompts(prompts) if prompts else [])]
    options = g.GenerateOptions(
        list(dict.fromkeys(wanted)),
        output,
        num,
        batch_size,
        seed,
        usual["steps"] if steps is None else steps,
        usual["guidance_scale"] if guidance_scale is None else guidance_scale,
        negative_prompt,
        resolution,
        scale,
        device,
        offload,
    )
    if control is not None:
        if run is None:
            raise UserError("--control goes with --run: a base alone has no control encoder")
        from etherdiff.use.generate_controlled import ControlUse, generate_controlled

        generate_controlled(run, control, options, ControlUse(control_scale, guide_control))
        return
    source = g.run_source(run) if run is not None else g.Source(g.find_base(str(base)), adapter or [])
    if source.hint_encoder is not None:
        raise UserError(f"{run} is a controllable run: say with --control what is to be followed (a file, or a folder of them)")
    g.generate(source, options)


@app.command("eval", rich_help_panel="Judge the result")
def eval_command(
    run: RunArgument,
    prompts: Annotated[
        Path | None, typer.Option(help="text file with a prompt per line, identifier included, instead of DreamBooth's 25")
    ] = None,
    num: Annotated[int | None, typer.Option(help="images per prompt [default: 4]".replace("[", "\\["))] = None,
    seed: Annotated[int, typer.Option(help="seed of a prompt's (or the first map's) first image; the next ones count up")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(help="denoising steps [default: 25 of DPM-Solver++; with control 50 of DDIM]".replace("[", "\\[")),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="images drawn at once")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    metrics: Annotated[
        str | None, typer.Option(help="scores to compute, with commas between; all of a subject's or signal's, unless given")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="networks to score by, paper or tiny; that of the base, unless given")
    ] = None,
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="another network for dino, clip, lpips, fid or segmenter: hub id or folder; landmarks=FILE.task; repeatable",
        ),
    ] = None,
    plain_clip_t: Annotated[bool, typer.Option("--plain-clip-t", help="CLIP-T to the prompts without the identifier")] = False,
    checkpoint: Annotated[str, typer.Option(help="what to judge: last (the result), best or step-N")] = "last",
    with_base: Annotated[bool, typer.Option("--base/--no-base", help="draw and score the base's own images beside")] = True,
    num_maps: Annotated[
        int | None,
        typer.Option(
            help="maps to draw from [default: all to evaluate with, at most 2000]".replace("[", "\\["),
            rich_help_panel=CONTROLLED,
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="strength of the prompt [default: 9]".replace("[", "\\["), rich_help_panel=CONTROLLED),
    ] = None,
    guide_control: Annotated[bool, typer.Option("--guide-control", help=GUIDE_CONTROL, rich_help_panel=CONTROLLED)] = False,
    shuffle_maps: Annotated[
        bool, typer.Option("--shuffle-maps", help="draw and score with other maps beside", rich_help_panel=CONTROLLED)
    ] = False,
    without_control: Annotated[
        bool, typer.Option("--without-control", help="draw and score without any map beside", rich_help_panel=CONTROLLED)
    ] = False,
    real: Annotated[bool, typer.Option("--real", help="score the real images beside", rich_help_panel=CONTROLLED)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace images made with other settings")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print metrics.json")] = False,
) -> None:
    """Draw a run's prompts, with their maps where it is controllable, and score the images, with intervals."""
    from etherdiff.eval import evaluate as e
    from etherdiff.eval import evaluate_control as c
    from etherdiff.runs.folder import RunFolder

    common: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "device": device, "preset": preset}
    common |= {"backbones": tuple(backbone or ()), "overwrite": overwrite}
    if steps is not None:
        common["steps"] = steps
    if metrics is not None:
        common["metrics"] = tuple(filter(None, map(str.strip, metrics.split(","))))
    of_subjects = {
        "prompts": prompts is not None,
        "num": num is not None,
        "plain-clip-t": plain_clip_t,
        "checkpoint": checkpoint != "last",
        "no-base": not with_base,
    }
    of_control = {
        "num-maps": num_maps is not None,
        "guidance-scale": guidance_scale is not None,
        "guide-control": guide_control,
        "shuffle-maps": shuffle_maps,
        "without-control": without_control,
        "real": real,
    }
    is_controlled = c.is_control_run(run)
    misplaced = [f"--{name}" for name, given in (of_subjects if is_controlled else of_control).items() if given]
    if misplaced and RunFolder(run).settings.is_file():
        task, other = ("train-s2i", "train-dreambooth") if is_controlled else ("train-dreambooth", "train-s2i")
        raise UserError(f"{run} is a run of {task}, and {', '.join(misplaced)} is for runs of {other}")
    if is_controlled:
        common |= {
            "guide_control": guide_control,
            "shuffle_maps": shuffle_maps,
            "without_control": without_control,
            "real": real,
        }
        if guidance_scale is not None:
            common["guidance_scale"] = guidance_scale
        result = c.evaluate_control(run, c.ControlOptions(num_maps=num_maps, **common))
    else:
        if num is not None:
            common["num"] = num
        common |= {"clip_t_prompt": "without identifier" if plain_clip_t else "with identifier"}
        result = e.evaluate(run, e.EvalOptions(prompts=prompts, checkpoint=checkpoint, base=with_base, **common))
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        from rich.console import Console

        Console().print(c.render(result) if is_controlled else e.render(result))


@app.command(rich_help_panel="Judge the result")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN", help="run folders that etherdiff eval has scored")],
    anyway: Annotated[bool, typer.Option("--anyway", help="also scores that were not computed the same way, marked")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print a Markdown table")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Put the scores of several runs in one table, if they were computed the same way; else say what differs."""
    from etherdiff.eval import compare as c

    if markdown and as_json:
        raise UserError("give either --markdown or --json")
    columns = c.compare(runs, anyway)
    if as_json:
        typer.echo(json.dumps(c.as_json(columns), indent=2))
    elif markdown:
        typer.echo(c.as_markdown(columns))
    else:
        from rich.console import Console

        Console().print(c.as_table(columns))


@app.command("perturb", rich_help_panel="Judge the result")
@training_command(
    _perturb_config(),
    "Make a run that nobody trained: random matrices at a distance from the identity, to see what a base bears.",
)
def perturb(config: ConfigOption = None, settings: SetOption = None, *, flags: dict[str, Any]) -> None:
    """See `training_command`."""
    from etherdiff.system.terminal import say
    from etherdiff.tasks import perturb as p

    run = p.perturb(_read_config(_perturb_config(), config, settings, flags))
    say(f"{run}: done. Next: etherdiff eval {run}")


@app.command(rich_help_panel="Judge the result")
def table(
    paths: PathsArgument,
    rows: Annotated[
        str, typer.Option(metavar="KEY,…", help="a row for each value of these: configuration keys, subject")
    ] = "method",
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="scores, and facts such as step_flops [default: the paper's]".replace("[", "\\[")),
    ] = None,
    best: Annotated[
        str | None, typer.Option(metavar="KEY", help="per row its best value by the first score, and how wide good ones are")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(help="how much of a row's best is good enough for --best [default: 0.9]".replace("[", "\\[")),
    ] = None,
    format: Annotated[  # noqa: A002
        str | None, typer.Option(help="text, markdown, csv or html [default: as --output ends, else text]".replace("[", "\\["))
    ] = None,
    output: Annotated[Path | None, typer.Option(help="file to write instead of printing")] = None,
    with_paper: PaperOption = True,
    anyway: AnywayOption = False,
) -> None:
    """Scores and costs of many runs as a table with intervals: averaged over subjects and seeds, the paper's beside."""
    from etherdiff.results import formats
    from etherdiff.results.tables import TableOptions, make_table

    written = formats.find_format(format, output)
    shown = _listed(columns) if columns else None
    found = make_table(paths, TableOptions(_listed(rows), shown, best, share, with_paper, anyway))
    formats.show(found, written, output)


@app.command(rich_help_panel="Judge the result")
def plot(
    paths: PathsArgument,
    x: Annotated[
        str, typer.Option("--x", metavar="KEY", help="a configuration key with numbers, such as learning_rate; or step")
    ],
    y: Annotated[list[str], typer.Option("--y", metavar="NAME", help="a score or a fact; repeat for a panel each")],
    output: Annotated[Path, typer.Option(help="the picture: a .png or .svg file")],
    lines: Annotated[str, typer.Option(metavar="KEY,…", help="a line for each value of these")] = "method",
    title: Annotated[str | None, typer.Option(help="above the picture")] = None,
    with_paper: PaperOption = True,
    anyway: AnywayOption = False,
) -> None:
    """Scores, drift or cost of many runs as a figure: lines with error bars over a setting, or over the steps of training."""
    from etherdiff.results.curves import CurveOptions, make_figure
    from etherdiff.results.drawing import check_output, draw_figure
    from etherdiff.results.formats import left_out_notes
    from etherdiff.system.terminal import say, warn

    check_output(output)
    figure = make_figure(paths, CurveOptions(x, tuple(y), _listed(lines), with_paper, anyway))
    draw_figure(figure, output, title)
    for note in [*figure.remarks, *left_out_notes(figure.left_out)]:
        warn(note)
    say(f"{output}: {len(figure.panels)} panel{'s' if len(figure.panels) > 1 else ''}")


@app.command(rich_help_panel="Use the result")
def merge(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="folder for the pipeline; must be empty or not exist")],
    scale: Annotated[float, typer.Option(help="multiplies the adapter's update")] = 1.0,
    dtype: Annotated[str, typer.Option(help="precision of the UNet: fp32, fp16 or bf16")] = "fp32",
    single_file: Annotated[
        Path | None, typer.Option(help="also write one .safetensors checkpoint, for WebUI and ComfyUI")
    ] = None,
) -> None:
    """Fold the adapter into the base: a plain diffusers pipeline, checked by opening it with plain diffusers."""
    from etherdiff.system.terminal import say, warn
    from etherdiff.use.export import merge_to_folder, parse_dtype
    from etherdiff.use.generate import run_source

    precision = parse_dtype(dtype)
    source = run_source(run, "everything")
    adapters = [(path, scale) for path in source.adapters]
    proof = merge_to_folder(source.base, adapters, output, precision, single_file, source.hint_encoder)
    if proof["same_base"] is False:
        warn("the base's weights are not those that the adapter was trained on")
    if proof["left_out"]:
        warn(f"left out, since the base does not hold them whole: {', '.join(proof['left_out'])}")
    say(f"{output}: reopened with plain diffusers; largest difference {proof['max_abs_difference']:.1e}")
    if source.hint_encoder is not None:
        say(f"it holds its own code: DiffusionPipeline.from_pretrained({str(output)!r}, trust_remote_code=True)")
    if single_file is not None:
        say(f"{single_file}: the same as one file")


@app.command(rich_help_panel="Use the result")
def export(
    run: RunArgument,
    output: Annotated[Path, typer.Option(help="file (.safetensors) or folder to write")],
    format: Annotated[str, typer.Option(help="lora (diffusers), kohya (WebUI, ComfyUI, sd-scripts) or peft")] = "lora",  # noqa: A002
    scale: Annotated[float, typer.Option(help="multiplies the adapter's update")] = 1.0,
) -> None:
    """Write the adapter for another tool. A LoRA of ETHER is exact (rank 1; ETHER+: 4), but only on its own base."""
    from etherdiff.system.terminal import say
    from etherdiff.use.export import export_adapter, parse_format
    from etherdiff.use.generate import run_source

    source = run_source(run)
    if not source.adapters:
        raise UserError(
            f"{run} was trained with the method none: it has no adapter to export (etherdiff merge takes its encoder)"
        )
    if source.hint_encoder is not None and parse_format(format) != "peft":
        raise UserError(
            f"no {format} file holds a control encoder: use etherdiff merge, or --format peft for the adapter alone"
        )
    result = export_adapter(source.base, source.adapters[0], output, parse_format(format), scale)
    proof = f", rank {result['rank']}, loaded back and compared" if "rank" in result else ""
    say(f"{result['path']}: {format}{proof}")


@app.command("inspect", rich_help_panel="Look before")
def inspect_command(
    base: Annotated[str, typer.Option(help="sd15, sd21, tiny, hub id, folder or .safetensors; weights are not read")] = "sd15",
    task: Annotated[str, typer.Option(help="dreambooth or s2i")] = "dreambooth",
    method: Annotated[list[str] | None, typer.Option(help="only these methods; repeat for several")] = None,
    targets: Annotated[str | None, typer.Option(help="other layers than the task's usual ones")] = None,
    blocks: Annotated[int | None, typer.Option(help="diagonal blocks, for the methods that have them")] = None,
    rank: Annotated[int | None, typer.Option(help="rank, for the methods that have one")] = None,
    resolution: Annotated[int | None, typer.Option(help="side in pixels that FLOPs and memory are counted at")] = None,
    batch_size: Annotated[int, typer.Option(help="images that FLOPs and memory are counted for")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count what each method would train on a base: layers, parameters, size on disk, FLOPs and memory of a step."""
    from etherdiff.use.inspection import inspect_base, render_inspection

    result = inspect_base(base, task, method, targets, blocks=blocks, rank=rank, resolution=resolution, batch_size=batch_size)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        from rich.console import Console

        Console().print(render_inspection(result))


@app.command(rich_help_panel="Look before")
def demo(output: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("demo")) -> None:
    """Run the whole job on the tiny base in a few minutes: train, draw, score, merge, export, and say what to look at."""
    from etherdiff.use.demo import run_demo

    run_demo(output)


data = typer.Typer(no_args_is_help=True, help="Look at datasets for train-s2i before training on them.")
app.add_typer(data, name="data", rich_help_panel="Look before")


@data.command("check")
def check_data(
    dataset: Annotated[
        str, typer.Argument(metavar="NAME|FOLDER", help="ade20k, tiny, celebahq-landmarks, coco-canny, or a folder")
    ],
    data_root: Annotated[
        Path | None, typer.Option(help="where datasets are looked up [default: ETHERDIFF_DATA]".replace("[", "\\["))
    ] = None,
    signal: Annotated[
        str | None,
        typer.Option(help="segmentation, canny or landmarks, instead of the dataset's own; a folder's is segmentation"),
    ] = None,
    palette: Annotated[
        str | None, typer.Option(help="of segmentation: ade20k, tiny or a JSON file; else the dataset's own")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="caption file, instead of the dataset's captions")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Read every image and control: what is unreadable, mismatched, outside the palette, without a caption, or there twice."""
    from etherdiff.control import check
    from etherdiff.system.paths import data_root as find_data_root

    report = check.check_dataset(dataset, find_data_root(data_root), signal=signal, palette=palette, captions=captions)
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        from rich.console import Console

        Console().print(check.render(report))
    if report.problems:
        raise UserError(report.sentences())


def _listed(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def _relaunch_as_begun(run: Path) -> None:
    """A run of several processes goes on with as many: unless torchrun started this one, it becomes torchrun."""
    from etherdiff.runs.run import recorded_processes

    processes = recorded_processes(run)
    if processes < 2 or "WORLD_SIZE" in os.environ:
        return
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "etherdiff"]
    command = [sys.executable, *launch, *sys.argv[1:]]
    if os.name == "nt":  # has no exec: the new process would outlive this one, and its status would be lost
        sys.exit(subprocess.call(command))
    os.execv(sys.executable, command)


def _say_next(run: Path) -> None:
    from etherdiff.runs.folder import RunFolder
    from etherdiff.system.terminal import say

    controlled = RunFolder(run).control_encoder.is_dir()
    say(f"\n{run}: done. Next:")
    say(f"  etherdiff generate --run {run} {'--control MAP ' if controlled else ''}--prompt '…' --output pictures")
    say(f"  etherdiff eval {run}                        # draws and scores")
    say(f"  etherdiff merge {run} --output merged        # a diffusers pipeline")
    if not controlled:
        say(f"  etherdiff export {run} --format kohya --output adapter.safetensors")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"etherdiff {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Options of every command."""


def main() -> None:
    """The program: status 0 done, 1 it ran and failed, 2 what the user gave is wrong, 128 + N stopped by signal N."""
    try:
        with stop_signals():
            app()
    except UserError as error:
        _print_once([f"error: {problem}" for problem in error.problems])
        sys.exit(2)
    except (ProofError, RunError) as error:
        _print_once([f"error: {error}"])
        sys.exit(1)
    except Stopped as stop:
        _print_once([str(stop)])
        sys.exit(128 + stop.number)
    except Exception as error:
        from etherdiff.runs.faults import machine_fault

        if (fault := machine_fault(error)) is None:
            raise
        _print_once([f"error: {fault}"])
        sys.exit(1)


def _print_once(lines: list[str]) -> None:
    """To stderr, by the first process of a torchrun launch."""
    for line in lines if os.environ.get("RANK", "0") == "0" else ():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
