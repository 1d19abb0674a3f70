"""The program as it is typed: help, refusals, and the way from photos to files that other tools read."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from subject_photos import draw_subject
from typer.testing import CliRunner

import etherdiff
from etherdiff import cli, config
from etherdiff.config import DreamBoothConfig
from etherdiff.images.writing import read_png_settings

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("another_process")]
COMMANDS = typer.main.get_command(cli.app).commands


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    draw_subject(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, photos) -> Path:
    """A finished run; read it only."""
    AcceleratorState._reset_state(True)
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--subject", photos, "--base", "tiny", "--method", "ether+", "--steps", 2, "--output", run]
    arguments += ["--class-noun", "ball", "--class-images", 2, "--class-sampling-steps", 2]
    arguments += ["--tracker", "none", "--eval-scores", "off"]
    done = CliRunner().invoke(cli.app, ["train-dreambooth", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return run


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments, "-c", code], capture_output=True, text=True)


# --- Help --------------------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy():
    code = "import sys; sys.argv = ['etherdiff', '--help']; from etherdiff.cli import main; main()"
    done = python(code, "-X", "importtime")
    assert done.returncode == 0
    assert "train-dreambooth" in done.stdout
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "typer" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "PIL", "scipy"}


def test_every_way_to_start_it_is_the_same_program():
    folder = Path(sys.executable).parent
    for command in ([sys.executable, "-m", "etherdiff"], [str(folder / "etherdiff")]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (0, f"etherdiff {etherdiff.__version__}")


def plain(text: str) -> str:
    """Help without its frames, colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def letters(text: str) -> str:
    return re.sub(r"\s+", "", plain(text))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_option_is(command):
    done = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert done.exit_code == 0
    for parameter in COMMANDS[command].params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{command} {parameter.name} is not described"
        assert letters(parameter.help.replace("\\[", "[")) in letters(done.output), parameter.name
        if parameter.param_type_name == "option":
            assert all(name in done.output for name in parameter.opts)


MODELS = {
    "train-dreambooth": [config.DreamBoothConfig],
    "train-s2i": [config.S2IConfig],
    "perturb": [config.PerturbConfig],
    "resume": [config.ResumeOptions],
    "sweep": [config.SweepOptions],
    "generate": [config.GenerateOptions],
    "eval": [config.SubjectEvalOptions, config.ControlEvalOptions],
    "compare": [config.CompareOptions],
    "table": [config.TableOptions],
    "plot": [config.PlotOptions],
    "merge": [config.MergeOptions],
    "export": [config.ExportOptions],
    "inspect": [config.InspectOptions],
    "demo": [config.DemoOptions],
    "schema": [config.SchemaOptions],
    "data check": [config.CheckOptions],
}
OWN = {"config", "set", "json", "help"}
"""Options that belong to the command line and not to a model."""


def test_a_command_has_an_option_for_every_field_and_no_other():
    there = {name: command for name, command in COMMANDS.items() if name != "data"}
    there |= {f"data {name}": command for name, command in COMMANDS["data"].commands.items()}
    assert there.keys() == MODELS.keys()
    for command, models in MODELS.items():
        options = {flag: p for p in there[command].params if p.param_type_name == "option" for flag in p.opts}
        fields = {f"--{name.replace('_', '-')}": field for cls in models[::-1] for name, field in cls.model_fields.items()}
        assert options.keys() - {f"--{name}" for name in OWN} == fields.keys(), command
        for flag, field in fields.items():
            assert field.description in options[flag].help.replace("\\[", "["), (command, flag)
            assert options[flag].secondary_opts == ([f"--no-{flag[2:]}"] if field.annotation is bool else []), (command, flag)


def test_no_arguments_show_the_help(etherdiff_):
    _, out, err = etherdiff_()
    assert "train-dreambooth" in out + err


# --- Refusals ----------------------------------------------------------------------------------------------------------

NOWHERE = "no-such-folder"
REFUSED = {
    "unknown method": (["train-dreambooth", "--subject", "{photos}", "--method", "ethr"], ["method: ", "ether+one-sided"]),
    "negative rate": (["train-dreambooth", "--subject", "{photos}", "--learning-rate", "-1"], ["learning_rate: "]),
    "no subject": (["train-dreambooth"], ["subject: is needed"]),
    "missing subject": (["train-dreambooth", "--subject", NOWHERE, "--base", "tiny"], [NOWHERE]),
    "missing recipe": (["train-dreambooth", "--config", "no.yaml"], ["no.yaml: there is no such recipe"]),
    "unknown setting": (["train-dreambooth", "--subject", "{photos}", "--set", "stpes=3"], ["did you mean steps?"]),
    "several": (
        ["train-dreambooth", "--method", "x", "--steps", "0", "--seed", "a"],
        ["method: ", "steps: ", "seed: ", "subject: "],
    ),
    "resume nothing": (["resume", NOWHERE], [f"{NOWHERE} is not a run folder"]),
    "generate from nothing": (["generate", "--run", NOWHERE, "--prompt", "x", "--output", "{new}"], ["is not a run folder"]),
    "generate from an unfinished run": (["generate", "--run", "{bare}", "--prompt", "x", "--output", "{new}"], ["no adapter"]),
    "run and base": (
        ["generate", "--run", "{bare}", "--base", "tiny", "--prompt", "x", "--output", "{new}"],
        ["either --run, or --base"],
    ),
    "neither run nor base": (["generate", "--prompt", "x", "--output", "{new}"], ["either --run, or --base"]),
    "run and adapter": (
        ["generate", "--run", "{bare}", "--adapter", "x", "--prompt", "x", "--output", "{new}"],
        ["--adapter goes with --base"],
    ),
    "no prompt": (["generate", "--base", "tiny", "--output", "{new}"], ["prompt: "]),
    "missing prompts": (["generate", "--base", "tiny", "--prompts", "no.txt", "--output", "{new}"], ["no.txt"]),
    "bad numbers": (
        ["generate", "--base", "tiny", "--prompt", "x", "--output", "{new}", "--num", "0", "--seed", "-1", "--steps", "0"],
        ["num: ", "seed: ", "steps: "],
    ),
    "bad resolution": (
        ["generate", "--base", "tiny", "--prompt", "x", "--output", "{new}", "--resolution", "65"],
        ["resolution: must be a multiple of 16"],
    ),
    "bad device": (["generate", "--base", "tiny", "--prompt", "x", "--output", "{new}", "--device", "gpu"], ["device: "]),
    "missing adapter": (["generate", "--base", "tiny", "--adapter", NOWHERE, "--prompt", "x", "--output", "{new}"], [NOWHERE]),
    "eval nothing": (["eval", NOWHERE], [f"{NOWHERE} is not a run folder"]),
    "eval nothing as if it were controllable": (["eval", NOWHERE, "--num-maps", "3"], [f"{NOWHERE} is not a run folder"]),
    "merge nothing": (["merge", NOWHERE, "--output", "{new}"], [f"{NOWHERE} is not a run folder"]),
    "merge an unfinished run": (["merge", "{bare}", "--output", "{new}"], ["no adapter"]),
    "bad dtype": (["merge", "{bare}", "--output", "{new}", "--dtype", "fp8"], ["fp8", "fp16"]),
    "export nothing": (["export", NOWHERE, "--output", "{new}"], [f"{NOWHERE} is not a run folder"]),
    "inspect an unknown method": (["inspect", "--method", "ethr"], ["ethr"]),
    "inspect an unknown task": (["inspect", "--task", "s3i"], ["s3i"]),
    "missing base": (["generate", "--base", "no.safetensors", "--prompt", "x", "--output", "{new}"], ["no such file"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_with_status_2(name, etherdiff_, photos, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    settings = DreamBoothConfig(subject=str(photos), base="tiny").model_dump(mode="json")
    (bare / "run.yaml").write_text(json.dumps(settings | {"provenance": {"task": "dreambooth"}}))
    arguments, parts = REFUSED[name]
    places = {"{photos}": photos, "{bare}": bare, "{new}": tmp_path / "new"}
    status, out, err = etherdiff_(*(places.get(argument, argument) for argument in arguments))
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert lines
    for part in parts:
        assert any(part in line for line in lines), (part, err)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [["nonsense"], ["train-dreambooth", "--nonsense"], ["generate"], ["merge"]])
def test_what_the_parser_refuses_has_status_2_too(etherdiff_, arguments):
    status, _, err = etherdiff_(*arguments)
    assert status == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["resume", "~/none"],
        ["generate", "--run", "~/none", "--prompt", "x", "--output", "y"],
        ["merge", "~/none", "--output", "y"],
        ["export", "~/none", "--output", "y"],
        ["eval", "~/none"],
        ["compare", "~/none", "~/none"],
        ["table", "~/none"],
        ["sweep", "~/none"],
        ["train-dreambooth", "--config=~/none"],
        ["train-s2i", "--base", "tiny", "--dataset=~/none"],
        ["perturb", "--set", "subject=~/none"],
        ["inspect", "--base", "~/none.safetensors"],
        ["data", "check", "~/none"],
    ],
)
def test_every_path_may_begin_with_the_home_folder(arguments, etherdiff_, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    status, _, err = etherdiff_(*arguments)
    assert status == 2
    assert str(tmp_path / "none") in err.replace("\n", "")
    assert "~" not in err


@pytest.mark.parametrize("place", ["file/x", "loop/x", "x" * 300])
@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--base", "tiny", "--prompt", "x"],
        ["train-dreambooth", "--base", "tiny", "--subject", "candy_ball"],
        ["perturb", "--base", "tiny", "--subject", "candy_ball"],
        ["merge", "run"],
        ["export", "run"],
        ["table", "run"],
        ["plot", "run", "--x", "step", "--y", "loss"],
        ["sweep", "file.yaml"],
        ["schema"],
        ["demo"],
    ],
)
def test_an_output_that_the_system_refuses_is_said_before_the_work(arguments, place, etherdiff_, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("loop").symlink_to("loop")
    monkeypatch.setattr("etherdiff.run.load_base", None)  # nothing is loaded
    status, _, err = etherdiff_(*arguments, "--output", place)
    assert status == 2
    assert "output" in err or place in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EROFS, errno.ELOOP])
def test_what_the_system_refuses_on_the_way_is_one_line(number, etherdiff_, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "/some/place")

    monkeypatch.setattr("etherdiff.run.resume", refuse)
    status, _, err = etherdiff_("resume", "x")
    assert (status, len(err.splitlines())) == (1, 1)
    assert err.startswith(f"error: /some/place: {os.strerror(number)}. ")


@pytest.mark.skipif(os.name == "nt", reason="the locale of POSIX")
@pytest.mark.parametrize(
    ("environment", "shown"),
    [({}, "猫"), ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "猫"), ({"PYTHONIOENCODING": "ascii"}, r"\u732b")],
)
def test_any_text_is_read_printed_and_saved_under_an_ascii_locale(environment, shown, tmp_path):
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONUTF8"))}

    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "etherdiff", *arguments]
        return subprocess.run(command, capture_output=True, cwd=tmp_path, env={**variables, "LC_ALL": "C", **environment})

    refused = call("compare", "猫", "猫")
    assert (refused.returncode, refused.stderr.decode().splitlines()[0]) == (2, f"error: {shown}: there is no such run folder")
    assert call("schema", "--output", "猫.json").returncode == 0
    assert (tmp_path / "猫.json").is_file()
    saved = call(
        "train-dreambooth", "--base", "tiny", "--subject", "猫", "--class-noun", b"\xe9".decode("utf-8", "surrogateescape")
    )
    assert saved.returncode == 2
    assert saved.stderr.startswith(b"error: class_noun: must be a valid string")


def test_a_refusal_from_the_shell(tmp_path):
    """The real program once: status, streams, and no traceback."""
    command = [sys.executable, "-m", "etherdiff", "train-dreambooth", "--steps", "0", "--method", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split(":")[:2] for line in done.stderr.splitlines()] == [
        ["error", f" {name}"] for name in ("method", "steps", "subject")
    ]
    assert not list(tmp_path.iterdir())


def test_a_failure_of_ours_has_status_1(etherdiff_, monkeypatch):
    monkeypatch.setattr("etherdiff.run.resume", lambda *args: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["etherdiff", "resume", "x"])
    with pytest.raises(ZeroDivisionError):  # python's own status for what nobody catches is 1
        cli.main()


# --- The way through ---------------------------------------------------------------------------------------------------


def test_generate_writes_a_folder_per_prompt_and_a_sheet(etherdiff_, trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("# places\na sks ball on the beach\n\na photo of sks ball\n")
    output = tmp_path / "pictures"
    prompts = ["--prompt", "a photo of sks ball", "--prompts", tmp_path / "prompts.txt"]
    numbers = ["--num", 3, "--seed", 5, "--steps", 2, "--batch-size", 2, "--guidance-scale", 3, "--scale", 0.5]
    status, out, _ = etherdiff_("generate", "--run", trained, *prompts, *numbers, "--output", output)
    assert (status, out) == (0, "")
    folders = {"000-a-photo-of-sks-ball": "a photo of sks ball", "001-a-sks-ball-on-the-beach": "a sks ball on the beach"}
    expected = {f"{folder}/{seed}.png" for folder in folders for seed in (5, 6, 7)} | {"sheet.png"}
    assert {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} == expected
    for folder, prompt in folders.items():
        for seed in (5, 6, 7):
            settings = read_png_settings(output / folder / f"{seed}.png")
            assert (settings["prompt"], settings["seed"], settings["steps"]) == (prompt, seed, 2)
            assert (settings["guidance_scale"], settings["adapter_scale"], settings["model"]) == (3.0, 0.5, "tiny")
    with Image.open(output / "sheet.png") as sheet:
        assert sheet.width >= 3 * 64
        assert sheet.height >= 2 * 64


def test_a_picture_depends_on_its_own_seed_alone(etherdiff_, trained, tmp_path):
    common = ["--prompt", "a photo of sks ball", "--steps", 2]
    etherdiff_("generate", "--run", trained, *common, "--num", 3, "--seed", 1, "--output", tmp_path / "three")
    etherdiff_("generate", "--run", trained, *common, "--num", 1, "--seed", 2, "--output", tmp_path / "one")
    adapter = ["--base", "tiny", "--adapter", trained / "adapter"]
    etherdiff_("generate", *adapter, *common, "--num", 1, "--seed", 2, "--output", tmp_path / "base")
    name = "000-a-photo-of-sks-ball/2.png"
    three, one, base = (np.array(Image.open(tmp_path / folder / name)).astype(int) for folder in ("three", "one", "base"))
    assert abs(three - one).max() <= 1  # batches differ in the last bit
    assert (one == base).all()


def test_from_photos_to_the_files_of_other_tools(etherdiff_, trained, tmp_path):
    merged, single = tmp_path / "merged", tmp_path / "merged.safetensors"
    status, _, err = etherdiff_("merge", trained, "--output", merged, "--dtype", "fp32", "--single-file", single)
    assert status == 0, err
    assert (merged / "model_index.json").is_file()
    assert load_file(single)
    for kind, name in (("lora", "lora.safetensors"), ("kohya", "kohya.safetensors"), ("peft", "peft")):
        status, _, err = etherdiff_("export", trained, "--format", kind, "--output", tmp_path / name)
        assert status == 0, err
        assert (tmp_path / name).exists()
    assert all(key.startswith("lora_unet_") for key in load_file(tmp_path / "kohya.safetensors"))
    status, _, err = etherdiff_("export", trained, "--format", "gguf", "--output", tmp_path / "no")
    assert status == 2
    assert "gguf" in err
    status, _, err = etherdiff_("merge", trained, "--output", merged)
    assert status == 2
    assert str(merged) in err


def test_resume_extends_a_finished_run(etherdiff_, photos, tmp_path):
    run = tmp_path / "run"
    arguments = ["--subject", photos, "--base", "tiny", "--class-noun", "ball", "--no-prior-preservation", "--tracker", "none"]
    arguments += ["--eval-scores", "off"]
    assert etherdiff_("train-dreambooth", *arguments, "--set", "steps=9", "--steps", 1, "--output", run)[0] == 0
    assert etherdiff_("resume", run, "--steps", 3)[0] == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    status, _, err = etherdiff_("train-dreambooth", *arguments, "--output", run)
    assert status == 2
    assert "etherdiff resume" in err
    assert etherdiff_("train-dreambooth", "--config", run / "run.yaml", "--output", tmp_path / "again")[0] == 0


def test_a_dry_run_prints_and_writes_nothing(etherdiff_, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("etherdiff.families.sd1.load_base", None)  # no weight is read
    arguments = ["--subject", photos, "--base", "tiny", "--class-noun", "ball", "--method", "ether"]
    status, out, err = etherdiff_("train-dreambooth", *arguments, "--dry-run")
    assert status == 0
    for part in ("Nothing is wrong", "6,400", r"\d [KMG]iB", "time", "FLOP"):
        assert re.search(part, out + err)
    assert not list(tmp_path.iterdir())
    status, _, err = etherdiff_("train-dreambooth", *arguments, "--dry-run", "--blocks", 7)
    assert status == 2
    assert "error: " in err


def test_inspect_counts_as_the_paper_does(etherdiff_):
    status, out, _ = etherdiff_("inspect", "--base", "sd15", "--task", "dreambooth", "--method", "ether", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["methods"]["ether"]["trainable_parameters"] == 99456
    assert (found["targets"], found["layers"], found["path"]) == ("attention", 128, None)


def test_inspect_prints_a_table(etherdiff_):
    status, out, _ = etherdiff_("inspect", "--base", "tiny", "--method", "ether", "--method", "lora")
    assert status == 0
    assert "ether" in out
    assert "6,400" in out


def test_names_with_markup_do_not_break_what_is_said(etherdiff_, trained, tmp_path):
    output = tmp_path / "a [b" / "c]"  # rich would read [b/c] as a tag
    arguments = ["--run", trained, "--prompt", "x [/y] z", "--num", 1, "--steps", 1, "--output", output]
    status, _, err = etherdiff_("generate", *arguments)
    assert status == 0
    assert str(output) in err


def test_ctrl_c_is_status_130(etherdiff_, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("etherdiff.run.resume", interrupted)
    assert etherdiff_("resume", "x")[0] == 130
