"""`etherdiff schema`: JSON schemas of recipes and sweep files, with which editors complete and check them."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from etherdiff.config import (
    EVAL_OPTIONS,
    SWEEP_OWN_KEYS,
    TASK_CONFIGS,
    Resources,
    SchemaOptions,
    SweepFile,
)
from etherdiff.system.errors import UserError
from etherdiff.system.files import write_text
from etherdiff.system.terminal import say

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def write_schema(options: SchemaOptions) -> None:
    """Print a schema, or write it to a file. UserError if it cannot be written."""
    text = json.dumps(make_schema(options), indent=2, ensure_ascii=False) + "\n"
    if options.output is None:
        sys.stdout.write(text)
        return
    try:
        write_text(options.output, text)
    except OSError as error:
        raise UserError(f"output: {options.output} cannot be written ({error.strerror})") from error
    say(f"{options.output}: let a file begin with  # yaml-language-server: $schema={options.output}")


def make_schema(options: SchemaOptions) -> Schema:
    """Return the schema of a task's recipes, or of sweep files."""
    return {"$schema": DIALECT, **(_sweep_schema() if options.task == "sweep" else _recipe_schema(options.task))}


def _recipe_schema(task: str) -> Schema:
    """Return the schema of a recipe, which may be incomplete: the command line can give the rest. run.yaml is a recipe."""
    schema = _optional(TASK_CONFIGS[task].model_json_schema())
    provenance = {"type": "object", "description": "what a run recorded besides its options; not read"}
    return {
        **schema,
        "title": f"recipe of {task}",
        "properties": {**schema["properties"], "provenance": provenance},
    }


def _sweep_schema() -> Schema:
    schema = SweepFile.model_json_schema()
    definitions, branches = {}, []
    for task, config in TASK_CONFIGS.items():
        options = _optional(config.model_json_schema())["properties"]
        own = {name: field for name, field in options.items() if name not in SWEEP_OWN_KEYS}
        definitions[task] = _object(own)
        definitions[f"{task}-grid"] = _object({name: {"type": "array", "items": field} for name, field in own.items()})
        then = {"type": "array", "items": _reference(task), "description": "runs on top of this one, from its folder"}
        definitions[f"{task}-run"] = _object({**own, "then": then})
        definitions[f"{task}-eval"] = _optional(EVAL_OPTIONS[task].model_json_schema())
        parts = {
            "settings": _reference(task),
            "grid": _reference(f"{task}-grid"),
            "runs": {"type": "array", "items": _reference(f"{task}-run")},
            "eval": {"anyOf": [{"type": "boolean"}, _reference(f"{task}-eval")]},
        }
        branches.append({"if": {"properties": {"task": {"const": task}}}, "then": {"properties": parts}})
    definitions["resources"] = Resources.model_json_schema()
    properties = {**schema["properties"], "resources": _reference("resources")}
    return {**schema, "title": "sweep file", "properties": properties, "allOf": branches, "$defs": definitions}


def _optional(schema: Schema) -> Schema:
    return {name: value for name, value in schema.items() if name not in ("required", "description")}


def _object(properties: Mapping[str, Any]) -> Schema:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _reference(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}
