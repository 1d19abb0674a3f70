"""Write the pages of docs/reference that follow from the code: command line, configuration, methods, metrics.

python scripts/make_reference.py            # write them
python scripts/make_reference.py --check    # status 1 where a page is not what the code says
"""

import difflib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- written by scripts/make_reference.py: change the code, not this page -->\n"


def cell(text: object) -> str:
    """One cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; the cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- Command line ----------------------------------------------------------------------------------------------------


def all_commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Full name and command of everything below a group, in the order of its help."""
    for child, command in group.commands.items():
        full = f"{name} {child}"
        if hasattr(command, "commands"):
            yield from all_commands(command, full)
        else:
            yield full, command


def command_line_page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    from etherdiff.cli import app

    parts = [
        NOTE,
        "# Command line\n",
        "`etherdiff COMMAND --help` says the same. Exit status: 0 done; 1 it ran and failed; 2 what was given is wrong,",
    ]
    parts.append("with every mistake in one message; 130 or 143 stopped by a signal, with a checkpoint written.\n")
    for name, command in all_commands(typer.main.get_command(app), "etherdiff"):
        parts += [
            f"## {name}\n",
            f"{cell(command.help or '')}\n",
            markdown_table(["option", "meaning"], list(option_rows(command))),
        ]
    return "\n".join(parts)


def option_rows(command: Any) -> Iterator[list[str]]:
    """A row for every parameter of a command."""
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
        yield [names, cell((getattr(parameter, "help", None) or "").replace("\\[", "["))]


# --- Configuration ---------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Every key of a recipe, with its type, default and meaning."""
    from etherdiff.config import DreamBoothConfig, PerturbConfig, S2IConfig

    recipes = {"train-dreambooth": DreamBoothConfig, "train-s2i": S2IConfig, "perturb": PerturbConfig}
    parts = [
        NOTE,
        "# Configuration\n",
        "A recipe is a YAML file of these keys (`--config FILE`, `--set KEY=VALUE`, or a flag each; the later wins).",
    ]
    parts.append(
        "A run's `run.yaml` is a recipe too. `etherdiff schema` prints a JSON schema, with which editors complete recipes.\n"
    )
    for name, model in recipes.items():
        parts += [f"## Keys of {name}\n", markdown_table(["key", "values", "default", "meaning"], list(key_rows(model)))]
    return "\n".join(parts)


def key_rows(model: type[BaseModel]) -> Iterator[list[str]]:
    """A row for every field of a configuration."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        found = schema["properties"][name]
        default = "needed" if field.is_required() else "" if field.default is None else f"`{field.default}`"
        yield [f"`{name}`", values_of(found), default, cell(field.description or "")]


def values_of(schema: dict[str, Any]) -> str:
    """What a key may hold, in words, from its JSON schema."""
    options = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    return " or ".join(dict.fromkeys(map(_one_value, options)))


def _one_value(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return "list"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = " ".join(
        f"{sign} {schema[key]:g}" if schema[key] < 2**53 else f"{sign} 2⁶³" for key, sign in bounds.items() if key in schema
    )
    name = {"string": "path" if schema.get("format") == "path" else "text", "boolean": "true, false"}.get(
        schema.get("type", ""), schema.get("type", "text")
    )
    return f"{name} {limits}".strip()


# --- Methods and metrics ---------------------------------------------------------------------------------------------


def methods_page() -> str:
    """Every method with its counts on Stable Diffusion 1.5."""
    from etherdiff.adapters.methods import METHODS, TARGETS

    targets = ["attention", "attention+geglu"]  # the paper's, of either task
    rows = []
    for name, method in METHODS.items():
        numbers = [f"{count_parameters(name, TARGETS[target]):,}" for target in targets]
        rates = [f"{method.learning_rate:g}", f"{method.s2i_learning_rate:g}"]
        rows.append([f"`{name}`", cell(method.summary), *numbers, *rates, "yes" if method.lora_exact else "no"])
    counts = [f"parameters, `{target}`" for target in targets]
    return "\n".join(
        [
            NOTE,
            "# Methods\n",
            "Trainable parameters on the architecture of Stable Diffusion 1.5; the paper prints the same counts",
            "for the methods it has. `etherdiff inspect` counts them on any base, with FLOPs, memory and file size.\n",
            markdown_table(["method", "what it learns", *counts, "learning rate", "in S2I", "exact LoRA"], rows),
            "`none` (controllable generation only) trains the control encoder alone. Learning rates are the defaults:",
            "the paper's where it has one. `--blocks` and `--rank` change [some of them](configuration.md).\n",
        ]
    )


def count_parameters(method: str, targets: tuple[str, ...]) -> int:
    """Trainable parameters of a method on Stable Diffusion 1.5's UNet, which is built without weights."""
    import torch
    from diffusers import UNet2DConditionModel

    from etherdiff.adapters.methods import MethodOptions, add_adapter, trainable_parameters
    from etherdiff.families.bases import find_base

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(find_base("sd15", None, "configs").config("unet"))
    adapted = add_adapter(unet, method, MethodOptions(targets))
    return sum(parameter.numel() for parameter in trainable_parameters(adapted).values())


def metrics_page() -> str:
    """Every metric with its definition and range."""
    from etherdiff.eval.metrics import METRICS

    rows = []
    for name, entry in METRICS.items():
        lowest, highest = (f"{bound:g}".replace("inf", "∞") for bound in entry.range)
        better = "higher" if entry.higher_is_better else "lower"
        rows.append([f"`{name}`", cell(entry.definition), f"{lowest} to {highest}", better, entry.role])
    return "\n".join(
        [
            NOTE,
            "# Metrics\n",
            markdown_table(["metric", "definition", "range", "better", "network"], rows),
            "A score with `_held_out` in its name is against the subject's held-out images. Intervals and identity:",
            "[what makes two scores comparable](../explain/comparable.md).\n",
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": command_line_page,
    "configuration.md": configuration_page,
    "methods.md": methods_page,
    "metrics.md": metrics_page,
}


def main(check: Annotated[bool, typer.Option("--check", help="write nothing; status 1 where a page differs")] = False) -> None:
    """Write or check the generated pages."""
    stale = False
    for name, make in PAGES.items():
        path, wanted = REFERENCE / name, make().rstrip() + "\n"
        found = path.read_text(encoding="utf-8") if path.is_file() else ""
        if found == wanted:
            continue
        if check:
            stale = True
            print(*difflib.unified_diff(found.splitlines(), wanted.splitlines(), name, "the code", lineterm="", n=0), sep="\n")
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {path}")
    if stale:
        print("docs/reference is not what the code says: python scripts/make_reference.py")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
