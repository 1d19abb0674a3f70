"""The command line: parse, call, print. Nothing heavy is imported before a command runs.

A command is an options model of `etherdiff.config` and one function: `command` makes an option of every field.
"""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin

import typer

from etherdiff import __version__
from etherdiff import config as c
from etherdiff.system.errors import ProofError, RunError, Stopped, UserError
from etherdiff.system.signals import stop_signals
from etherdiff.system.text import expand_home, program

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
data = typer.Typer(no_args_is_help=True, help="Look at datasets for train-s2i before training on them.")

TRAIN, USE, JUDGE, LOOK = "Train", "Use the result", "Judge the result", "Look before"
RECIPE_PANELS = {  # the option that opens each panel of the help of a command that reads recipes
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
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="run folder")]
PathsArgument = Annotated[
    list[Path], typer.Argument(metavar="PATH…", help="run folders, or folders that hold some, such as a sweep's")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="recipe: a YAML file of options (a run's run.yaml is one)")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one option over the recipe's")]


# --- Commands from options models ------------------------------------------------------------------------------------


def command(
    name: str, panel: str, *models: type[c.Options], group: typer.Typer = app
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: its docstring is the help, and every field of its options models is an option.

    Values stay text: the model checks them, so that all mistakes come in one message. The function gets the model as
    `options`; of several models, the text as `given`, to be read when it is known which of them it is for. Parameters of
    its own are arguments and options as typer has them. A model of a run's configuration is also read from recipes.
    """
    reads_recipes = issubclass(models[0], c.AdapterConfig)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name not in ("options", "given")]
        parameters = [_parameter("recipe", ConfigOption), _parameter("settings", SetOption)] if reads_recipes else []
        shown: str | None = None
        for key in dict.fromkeys(key for model in models for key in model.model_fields):
            shown = RECIPE_PANELS.get(key, shown) if reads_recipes else _panel_of(key, models)
            fields = [model.model_fields[key] for model in models if key in model.model_fields]
            parameters.append(_parameter(key, _option(key, fields, shown)))
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]

        def run(**given: Any) -> None:
            mine = {p.name: expand_home(given.pop(p.name)) for p in own}
            if len(models) > 1:
                function(**mine, given={key: value for key, value in given.items() if value is not None})
                return
            recipe, settings = expand_home(given.pop("recipe", None)), given.pop("settings", None) or []
            options = c.read_config(models[0], recipe, settings, given)
            if not reads_recipes:  # a run's plan says all that is wrong with it at once
                _try_outputs(options)
            function(**mine, options=options)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        group.command(name, rich_help_panel=panel, help=inspect.getdoc(function))(run)
        return function

    return decorate


def _try_outputs(options: c.Options) -> None:
    """UserError, before anything is loaded, where what a command is to write cannot be written."""
    from etherdiff.system.files import why_not_writable

    paths = {name: getattr(options, name, None) for name in ("output", "single_file")}
    wrong = {name: why_not_writable(path) for name, path in paths.items() if path is not None}
    problems = [f"{name}: {why}; choose another place" for name, why in wrong.items() if why]
    if problems:
        raise UserError(problems)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _panel_of(name: str, models: tuple[type[c.Options], ...]) -> str | None:
    """Return the panel of options that only controllable runs have; None for the other options."""
    return "Controllable runs" if name not in models[0].model_fields else None


def _option(name: str, fields: list[Any], panel: str | None) -> Any:
    """Make the option of a field, which several models may have with defaults of their own."""
    field, flag = fields[0], "--" + name.replace("_", "-")
    is_switch = field.annotation is bool
    if is_switch:
        flag += f"/--no-{name.replace('_', '-')}"
    defaults = list(dict.fromkeys(_default_text(field) for field in fields))
    text = field.description
    if defaults != [""]:
        text += f" [default: {'; of controllable runs '.join(defaults)}]"
    text = text.replace("[", "\\[")  # not markup
    kind = bool if is_switch else list[str] if _is_repeated(field) else str
    shown = typer.Option(flag, help=text, metavar=_metavar(field), rich_help_panel=panel, show_default=False)
    return Annotated[Optional[kind], shown]  # noqa: UP045  typer reads this form on every version


def _default_text(field: Any) -> str:
    """Return the default as the help shows it; empty where there is nothing to show."""
    if field.annotation is bool:
        return "on" if field.default else ""
    if field.is_required() or field.default in (None, "", ()):
        return ""
    return ",".join(field.default) if isinstance(field.default, tuple) else str(field.default)


def _is_repeated(field: Any) -> bool:
    """Return whether an option is repeated for each value, instead of one text with commas."""
    parts = (field.annotation, *get_args(field.annotation))
    return any(get_origin(part) is tuple for part in parts) and c.SPLIT_COMMAS not in field.metadata


def _metavar(field: Any) -> str | None:
    if field.annotation is bool:
        return None
    if c.SPLIT_COMMAS in field.metadata:
        return "NAME,…"
    parts = [part for part in (get_args(field.annotation) or (field.annotation,)) if part is not type(None)]
    literals = [value for value in parts if isinstance(value, str)] or list(get_args(parts[0]))
    if literals and all(isinstance(value, str) for value in literals):
        return "|".join(literals) if len("|".join(literals)) < 30 else "NAME"
    return {int: "N", float: "X", Path: "PATH"}.get(parts[0], "TEXT")


def _print(content: Any, as_json: bool, render: Callable[[Any], Any]) -> None:
    """Print as JSON, or as a table for the terminal."""
    if as_json:
        typer.echo(json.dumps(content, indent=2))
        return
    from etherdiff.system.terminal import make_console

    make_console().print(render(content))


# --- Train -----------------------------------------------------------------------------------------------------------


@command("train-dreambooth", TRAIN, c.DreamBoothConfig)
def train_dreambooth(options: c.DreamBoothConfig) -> None:
    """Teach the base one subject from a few photos (DreamBooth), with an adapter of a few hundred kilobytes."""
    _train(options)


@command("train-s2i", TRAIN, c.S2IConfig)
def train_s2i(options: c.S2IConfig) -> None:
    """Teach the base to follow a control image (semantic map, Canny edges, face landmarks): an adapter and a small encoder."""
    _train(options)


def _train(options: c.TrainConfig) -> None:
    if options.dry_run:
        from etherdiff.use.inspection import dry_run

        dry_run(options)
        return
    from etherdiff.run import train

    _say_next(train(options))


@command("resume", TRAIN, c.ResumeOptions)
def resume(run: RunArgument, options: c.ResumeOptions) -> None:
    """Continue a stopped run from its newest whole checkpoint; or extend a finished one with --steps."""
    _relaunch_as_begun(run)
    from etherdiff.run import resume as resume_run

    _say_next(resume_run(run, options.steps, options.on_nan))


@command("sweep", TRAIN, c.SweepOptions)
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file that says which runs; see configs/sweeps/")],
    options: c.SweepOptions,
) -> None:
    """Make and score many runs from one file: finished runs are skipped, stopped ones are resumed."""
    from etherdiff.sweeps import sweep as s

    if not (options.print_commands or options.dry_run):
        s.run_sweep(file, options)
        return
    for line in s.print_commands(file, options) if options.print_commands else s.dry_run(file, options):
        typer.echo(line)


# --- Use the result --------------------------------------------------------------------------------------------------


@command("generate", USE, c.GenerateOptions)
def generate(options: c.GenerateOptions) -> None:
    """Draw images of prompts with a run's adapter (or any adapters on a base), each with its settings inside."""
    from etherdiff.use.generate import generate as draw

    draw(options)


@command("merge", USE, c.MergeOptions)
def merge(
    options: c.MergeOptions,
    run: Annotated[Optional[Path], typer.Argument(metavar="RUN", help="run folder; or else --base with --adapter")] = None,  # noqa: UP045
) -> None:
    """Fold the adapter into the base: a plain diffusers pipeline, checked by opening it with plain diffusers."""
    from etherdiff.system.terminal import say, warn
    from etherdiff.use.merge import merge_run

    proof = merge_run(run, options)
    if proof["same_base"] is False:
        warn("the base's weights are not those that the adapter was trained on")
    if proof["left_out"]:
        warn(f"left out, since the base does not hold them whole: {', '.join(proof['left_out'])}")
    say(f"{options.output}: reopened with plain diffusers; largest difference {proof['max_abs_difference']:.1e}")
    if proof["holds_code"]:
        loading = f"DiffusionPipeline.from_pretrained({str(options.output)!r}, trust_remote_code=True)"
        say(f"it holds its own code: {loading}")
    if options.single_file is not None:
        say(f"{options.single_file}: the same as one file")


@command("export", USE, c.ExportOptions)
def export(run: RunArgument, options: c.ExportOptions) -> None:
    """Write the adapter for another tool. A LoRA of ETHER is exact (rank 1; ETHER+: 4), but only on its own base."""
    from etherdiff.system.terminal import say
    from etherdiff.use.export import export_run

    result = export_run(run, options)
    proof = f", rank {result['rank']}, loaded back and compared" if "rank" in result else ""
    say(f"{result['path']}: {options.format}{proof}")


# --- Judge the result ------------------------------------------------------------------------------------------------


@command("eval", JUDGE, c.SubjectEvalOptions, c.ControlEvalOptions)
def eval_run(run: RunArgument, as_json: JsonOption = False, *, given: Mapping[str, Any]) -> None:
    """Draw a run's prompts, with their maps where it is controllable, and score the images, with intervals."""
    from etherdiff.eval.evaluate import evaluate, render
    from etherdiff.report import show_report
    from etherdiff.runs.run import Run

    opened = Run.open(run)
    found = evaluate(opened, _of_task(opened.is_controlled, run, given))
    show_report(run)
    _print(found, as_json, render)


def _of_task(is_controlled: bool, run: Path, given: Mapping[str, Any]) -> c.EvalOptions:
    """Return the options given. UserError where some are for runs of the other task, and not their defaults."""
    models: list[type[c.EvalOptions]] = [c.SubjectEvalOptions, c.ControlEvalOptions]
    tasks = ["train-dreambooth", "train-s2i"]
    model, other = models[is_controlled], models[not is_controlled]
    others = [name for name in given if name not in model.model_fields]
    misplaced = [name for name in others if given[name] != other.model_fields[name].default]
    flags = [f"--{'no-' if given[name] is False else ''}{name.replace('_', '-')}" for name in misplaced]
    if flags:
        raise UserError(
            f"{run} is a run of {tasks[is_controlled]}, and {', '.join(flags)} is for runs of {tasks[not is_controlled]}"
        )
    return c.read_config(model, None, [], {name: value for name, value in given.items() if name not in others})


@command("compare", JUDGE, c.CompareOptions)
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN", help="run folders that etherdiff eval has scored")],
    options: c.CompareOptions,
    as_json: JsonOption = False,
) -> None:
    """Put the scores of several runs in one table, if they were computed the same way; else say what differs."""
    from etherdiff.eval import compare as e

    if options.markdown and as_json:
        raise UserError("give either --markdown or --json")
    columns = e.compare(runs, options.anyway)
    if options.markdown:
        typer.echo(e.as_markdown(columns))
    else:
        _print(e.as_json(columns) if as_json else columns, as_json, e.as_table)


@command("perturb", JUDGE, c.PerturbConfig)
def perturb(options: c.PerturbConfig) -> None:
    """Make a run without training: random matrices at a distance from the identity, to measure what the base tolerates."""
    from etherdiff.system.terminal import say
    from etherdiff.tasks.perturb import perturb as make

    run = make(options)
    say(f"{run}: done. Next: {program('eval', run)}")


@command("table", JUDGE, c.TableOptions)
def table(paths: PathsArgument, options: c.TableOptions) -> None:
    """Show scores and costs of many runs as a table with intervals, averaged over subjects and seeds, next to the paper's."""
    from etherdiff.results import formats
    from etherdiff.results.tables import make_table

    formats.show(make_table(paths, options), formats.find_format(options.format, options.output), options.output)


@command("plot", JUDGE, c.PlotOptions)
def plot(paths: PathsArgument, options: c.PlotOptions) -> None:
    """Draw scores, drift or cost of many runs: lines with error bars over a setting, or over the steps of training."""
    from etherdiff.results.figures import check_output, draw_figure, make_figure
    from etherdiff.results.formats import left_out_notes
    from etherdiff.system.terminal import say, warn

    check_output(options.output)
    figure = make_figure(paths, options)
    draw_figure(figure, options.output, options.title)
    for note in [*figure.remarks, *left_out_notes(figure.left_out)]:
        warn(note)
    say(f"{options.output}: {len(figure.panels)} panel{'s' if len(figure.panels) > 1 else ''}")


# --- Look before -----------------------------------------------------------------------------------------------------


@command("inspect", LOOK, c.InspectOptions)
def inspect_base(options: c.InspectOptions, as_json: JsonOption = False) -> None:
    """Count what each method would train on a base: layers, parameters, size on disk, FLOPs and memory of a step."""
    from etherdiff.use.inspection import inspect_base as count
    from etherdiff.use.inspection import render_inspection

    _print(count(options), as_json, render_inspection)


@command("demo", LOOK, c.DemoOptions)
def demo(options: c.DemoOptions) -> None:
    """Run the whole job on the tiny base in a few minutes: train, draw, score, merge, export, and say what to look at."""
    from etherdiff.report import show_report
    from etherdiff.run import train
    from etherdiff.use.demo import run_demo

    run_demo(options.output, train, show_report)


@command("check", LOOK, c.CheckOptions, group=data)
def check_data(
    dataset: Annotated[
        str, typer.Argument(metavar="NAME|FOLDER", help="ade20k, tiny, celebahq-landmarks, coco-canny, or a folder")
    ],
    options: c.CheckOptions,
    as_json: JsonOption = False,
) -> None:
    """Read every image and control: what is unreadable, mismatched, outside the palette, without a caption, or there twice."""
    from etherdiff.control import datasets
    from etherdiff.system.files import data_root

    root = data_root(options.data_root)
    report = datasets.check_dataset(dataset, root, signal=options.signal, palette=options.palette, captions=options.captions)
    _print(report.as_json() if as_json else report, as_json, datasets.render)
    if report.problems:
        raise UserError(report.sentences())


@command("schema", LOOK, c.SchemaOptions)
def schema(options: c.SchemaOptions) -> None:
    """Print the JSON schema of recipes or sweep files, with which editors complete and check them.

    For yaml-language-server (VS Code, Neovim and others), write it with --output and let a file begin with:

      # yaml-language-server: $schema=FILE
    """
    from etherdiff.use.schema import write_schema

    write_schema(options)


app.add_typer(data, name="data", rich_help_panel=LOOK)


# --- The program -----------------------------------------------------------------------------------------------------


def _relaunch_as_begun(run: Path) -> None:
    """Become torchrun, unless started by it, where several processes began the run: as many have to continue it."""
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
    control = ["--control", "MAP"] if controlled else []
    say(f"  {program('generate', '--run', run, *control, '--prompt', '…', '--output', 'pictures')}")
    say(f"  {program('eval', run)}                        # draws and scores")
    say(f"  {program('merge', run, '--output', 'merged')}        # a diffusers pipeline")
    if not controlled:
        say(f"  {program('export', run, '--format', 'kohya', '--output', 'adapter.safetensors')}")


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
    """Take the options of every command."""


def main() -> None:
    """Run the program: status 0 done, 1 it ran and failed, 2 what the user gave is wrong, 128 + N stopped by signal N."""
    _read_and_print_any_text()
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
        from etherdiff.system.devices import machine_fault

        if (fault := machine_fault(error)) is None:
            raise
        _print_once([f"error: {fault}"])
        sys.exit(1)


def _read_and_print_any_text() -> None:
    """Begin again in Python's UTF-8 mode where the locale's encoding is another; print what a stream cannot hold as escapes."""
    if os.name == "posix" and sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"  # arguments, names of files and child processes: it cannot be switched on later
        os.execv(sys.executable, sys.orig_argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_once(lines: list[str]) -> None:
    """Print to stderr, from the first process of a torchrun launch only."""
    for line in lines if os.environ.get("RANK", "0") == "0" else ():
        print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
