"""`etherdiff schema`: every shipped recipe and sweep file fits, and what is wrong does not."""

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from etherdiff.config import SchemaOptions
from etherdiff.use.schema import make_schema

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = ("dreambooth", "s2i", "perturb", "sweep")
SHIPPED = [
    *(("dreambooth", path) for path in sorted(CONFIGS.glob("**/dreambooth/*.yaml"))),
    *(("s2i", path) for path in sorted(CONFIGS.glob("**/s2i/*.yaml"))),
    *(("sweep", path) for path in sorted(CONFIGS.glob("sweeps/**/*.yaml"))),
]


class EditorLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 has them, and so as editors do: 3e-05 is one. PyYAML has YAML 1.1, where it is text."""


EditorLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def validator(task: str) -> Draft202012Validator:
    return Draft202012Validator(make_schema(SchemaOptions(task=task)))


@pytest.mark.parametrize("task", TASKS)
def test_each_is_a_schema(task):
    schema = make_schema(SchemaOptions(task=task))
    Draft202012Validator.check_schema(schema)
    assert all(field.get("description") for name, field in schema["properties"].items() if name not in ("resources",))


def test_every_shipped_file_is_looked_at():
    assert {path for _, path in SHIPPED} == set(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize(("task", "path"), SHIPPED, ids=[str(path.relative_to(CONFIGS)) for _, path in SHIPPED])
def test_shipped_files_fit(task, path):
    content = yaml.load(path.read_text(encoding="utf-8"), EditorLoader)
    assert [error.message for error in validator(task).iter_errors(content)] == []


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("dreambooth", {"stepz": 3}),
        ("dreambooth", {"steps": 0}),
        ("dreambooth", {"method": "ethr"}),
        ("dreambooth", {"dataset": "tiny"}),
        ("dreambooth", {"mixed_precision": True}),
        ("s2i", {"steps": "many"}),
        ("perturb", {"method": "lora"}),
        ("sweep", {}),
        ("sweep", {"task": "paint"}),
        ("sweep", {"task": "dreambooth", "settings": {"stepz": 3}}),
        ("sweep", {"task": "dreambooth", "settings": {"output": "runs"}}),
        ("sweep", {"task": "dreambooth", "grid": {"seed": 3}}),
        ("sweep", {"task": "s2i", "runs": [{"subject": "dog"}]}),
        ("sweep", {"task": "s2i", "eval": {"num": 3}}),
        ("sweep", {"task": "dreambooth", "resources": {"gpu": 1}}),
    ],
)
def test_what_is_wrong_does_not_fit(task, content):
    assert not validator(task).is_valid(content)


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("dreambooth", {"mixed_precision": False, "eval_scores": True, "provenance": {"task": "dreambooth"}}),
        ("sweep", {"task": "dreambooth", "eval": {"metrics": "dino,clip_t"}}),
        ("sweep", {"task": "dreambooth", "eval": False}),
        ("sweep", {"task": "s2i", "runs": [{"method": "oft", "then": [{"refit": "{previous}", "steps": 60}]}]}),
    ],
)
def test_what_is_read_fits(task, content):
    assert validator(task).is_valid(content)


def test_the_command_prints_or_writes_it(etherdiff_, tmp_path):
    status, out, _ = etherdiff_("schema", "--task", "s2i")
    assert (status, json.loads(out)) == (0, make_schema(SchemaOptions(task="s2i")))
    status, out, err = etherdiff_("schema", "--output", tmp_path / "dreambooth.json")
    assert (status, out) == (0, "")
    assert "yaml-language-server: $schema=" in err
    assert json.loads((tmp_path / "dreambooth.json").read_text()) == make_schema(SchemaOptions())
    assert etherdiff_("schema", "--output", tmp_path / "dreambooth.json" / "under")[0] == 2
    assert etherdiff_("schema", "--task", "paint")[0] == 2
