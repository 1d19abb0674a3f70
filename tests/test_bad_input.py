"""Bad input through the program: every mistake in one message, status 2, no traceback, nothing started, no code run."""

import ast
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import small_config

import etherdiff
from etherdiff import cli
from etherdiff import run as run_module
from etherdiff.adapters.io import load_adapter
from etherdiff.config import GenerateOptions
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.run import train_dreambooth
from etherdiff.system.errors import UserError
from etherdiff.tasks.dreambooth import plan_dreambooth
from etherdiff.tiny import tiny_folder
from etherdiff.use.generate import generate

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("another_process")]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Run the program, which has to refuse: the lines that it says. Nothing is loaded, and no run folder appears."""
    monkeypatch.setattr(run_module, "load_base", None)

    def run(*arguments: object, command: str = "train-dreambooth") -> list[str]:
        monkeypatch.setattr(sys, "argv", ["etherdiff", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert (left.value.code, out) == (2, ""), err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()
        return err.splitlines()

    return run


def test_a_folder_of_everything_that_is_no_image(refused, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    whole.save(photos / "01-whole.png")
    (photos / "02-zero.jpg").write_bytes(b"")
    whole.save(photos / "torn.jpg")
    (photos / "03-torn.jpg").write_bytes((photos / "torn.jpg").read_bytes()[:-300])
    (photos / "torn.jpg").unlink()
    whole.save(photos / "04-mislabelled.jpg", "PNG")  # which is an image all the same
    whole.save(photos / "05-animated.gif", save_all=True, append_images=[whole.rotate(90)])
    Image.new("1", (20_000, 20_000)).save(photos / "06-enormous.png")
    (photos / "07-text.jpeg").write_text("<html>")
    (photos / "08-program.png").write_bytes(b"\x7fELF" + bytes(100))
    (photos / "09-folder.jpg").mkdir()
    (photos / "10-link.webp").symlink_to(photos / "nowhere")
    (photos / "11-lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    lines = refused("--base", "tiny", "--subject", photos, "--blocks", 7, "--output", tmp_path / "run")
    reasons = {
        "02-zero.jpg": "zero bytes",
        "03-torn.jpg": "truncated",
        "05-animated.gif": "animated: 2 frames",
        "06-enormous.png": "too large: 400,000,000 pixels",
        "07-text.jpeg": "not an image",
        "08-program.png": "not an image",
        "10-link.webp": "broken link",
        "11-lfs.png": "Git LFS pointer",
    }
    assert any("8 of 10 images cannot be read: remove them or pass --skip-bad" in line for line in lines)
    for name, reason in reasons.items():
        assert sum(name in line and reason in line for line in lines) == 1, (name, lines)
    assert not any("whole" in line or "mislabelled" in line for line in lines)
    assert any("class_noun" in line for line in lines)  # and whatever else is wrong
    assert any("7 blocks" in line for line in lines)


TEXTS = {
    "emoji": "🐕‍🦺🦄",
    "right to left": "כלב של סבא",
    "a right-to-left override": "\u202egod",
    "a path": "../../etc/passwd",
    "markup": "<script>alert(1)</script> [red]",
    "a format": "{identifier} %s {0.__class__}",
    "several lines": "a\nb\tc",
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_can_name_a_subject(name, tmp_path):
    plan = plan_dreambooth(small_config(tmp_path / "run", identifier=TEXTS[name], class_noun=TEXTS[name]))
    assert plan.subject_prompt == f"a photo of {TEXTS[name]} {TEXTS[name]}"
    assert plan.output == tmp_path / "run"


def test_no_text_leads_out_of_the_run_folder(tmp_path):
    texts = TEXTS["a path"], TEXTS["right to left"]
    options = {"sample_prompts": texts, "sample_every": 1, "sample_count": 1, "steps": 1}
    run = train_dreambooth(small_config(tmp_path / "run", identifier=TEXTS["emoji"], class_noun=TEXTS["a path"], **options))
    assert {path.name for path in tmp_path.iterdir()} == {"ball", "run"}
    folders = sorted(path.name for path in (run / "samples" / "step-000001").iterdir())
    assert [name[:4] for name in folders] == [f"{index:03d}-" for index in range(len(texts))]
    assert all(name.isascii() for name in folders)


@pytest.mark.parametrize("option", ["identifier", "class-noun", "subject"])
@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_text_is_refused(option, text, refused, tmp_path):
    options = {"subject": tmp_path, "class-noun": "ball", option: text}
    lines = refused("--base", "tiny", "--steps", 0, *(part for name, value in options.items() for part in (f"--{name}", value)))
    assert any(option.replace("-", "_") in line for line in lines)
    assert any("steps" in line for line in lines)


@pytest.mark.parametrize("option", ["identifier", "class_noun", "subject", "base", "output", "method"])
def test_ten_thousand_characters(option, tmp_path):
    config = small_config(tmp_path / "run")
    with pytest.raises((UserError, ValueError)) as caught:
        plan_dreambooth(type(config)(**(config.model_dump() | {option: ("wor d" * 2000)})))
    assert not isinstance(caught.value, OSError)


def test_a_prompt_longer_than_the_encoder_reads_is_not_cut_in_silence(refused, tmp_path):
    small_config(tmp_path / "run")
    arguments = ["--base", "tiny", "--subject", tmp_path / "ball", "--class-noun", "dog", "--output", tmp_path / "run"]
    (line,) = refused(*arguments, "--identifier", "word " * 2000)
    assert "the text encoder reads 77: shorten them" in line


def test_nul_is_refused_wherever_it_stands(refused, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    names = ("subject", "output", "base", "identifier", "class_noun", "data_root")
    recipe.write_text("".join(f'{name}: "a\\0b"\n' for name in names))
    lines = refused("--config", recipe)
    assert len(lines) == len(names)
    assert all("NUL" in line for line in lines)


def test_a_run_folder_whose_settings_are_a_bomb(refused, tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.yaml").write_text(bomb + "provenance: {task: dreambooth}\n")
    for command in (["resume"], ["merge", "--output", tmp_path / "merged"], ["export", "--output", tmp_path / "x.safetensors"]):
        assert "aliases" in refused(tmp_path / "theirs", *command[1:], command=command[0])[0]


# --- Adapters of another base ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return train_dreambooth(small_config(tmp_path_factory.mktemp("adapter") / "run", steps=1)) / "adapter"


@pytest.mark.parametrize("change", ["shapes", "more keys", "fewer keys"])
def test_an_adapter_of_another_base_names_keys_and_shapes(change, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    if change == "shapes":
        tensors[name] = torch.zeros(1, 320)
    elif change == "more keys":
        tensors["base_model.model.down_blocks.3.to_q.ether_u"] = torch.zeros(1, 4)
    else:
        del tensors[name]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(UserError) as caught:
        load_adapter(load_base(find_base("tiny")).unet, folder)
    (problem,) = caught.value.problems
    assert {"shapes": "(1, 320) in the file", "more keys": "down_blocks.3.to_q", "fewer keys": "missing"}[change] in problem
    assert "another base (tiny)" in problem
    assert change != "shapes" or name.removeprefix("base_model.model.") in problem


# --- Nobody's file runs code -------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """The bytes of a pickle that runs code, and the file that shows it did."""
    seen = tmp_path / "code was run"
    pickle.loads(pickle.dumps(Canary(seen)))
    assert seen.exists()  # it does
    seen.unlink()
    return pickle.dumps(Canary(seen)), seen


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".safetensors"])
def test_a_pickled_base_is_not_opened(suffix, canary, refused, tmp_path):
    (tmp_path / f"model{suffix}").write_bytes(canary[0])
    small_config(tmp_path / "run")
    arguments = ["--class-noun", "ball", "--subject", tmp_path / "ball", "--output", tmp_path / "run"]
    (line,) = refused("--base", tmp_path / f"model{suffix}", *arguments)
    assert "safetensors" in line
    assert not canary[1].exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_with_pickled_parts_is_not_opened(part, canary, tmp_path):
    base = Path(shutil.copytree(tiny_folder(), tmp_path / "base"))
    (file,) = (base / part).glob("*.safetensors")
    file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (base / part / name).write_bytes(canary[0])
    with pytest.raises(UserError, match=r"pickled weights.*safetensors only; convert it with"):
        load_base(find_base(str(base)))
    assert not canary[1].exists()


def test_a_pickled_adapter_is_not_opened(canary, adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(canary[0])
    options = GenerateOptions(base="tiny", adapter=[folder], prompt=["x"], output=tmp_path / "pictures", num=1, steps=1)
    with pytest.raises(UserError, match=r"a pickle, which can run code.*convert it there"):
        generate(options)
    assert not canary[1].exists()


def test_a_pickle_in_the_place_of_any_file_of_a_run(canary, adapter, tmp_path):
    """Under the right name, as a checkpoint or an adapter: refused or passed over, never run."""
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000001/optimizer.safetensors", "run.yaml"):
        run = Path(shutil.copytree(adapter.parent, tmp_path / name.replace("/", "-")))
        (run / name).write_bytes(canary[0])
        run_module.resume(run)
        assert not canary[1].exists()


TRUSTED = "DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, trust_remote_code=True)"
"""The one place where code of a folder runs: merge reads back what it has itself just written there."""


def test_nothing_of_ours_unpickles_or_trusts_code():
    for path in Path(etherdiff.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
            name, options = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert name not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load", "joblib.load"), (path, name)
            assert not name.startswith(("pickle.", "dill.")), (path, name)
            assert name != "torch.load" or options.get("weights_only") == "True", path
            trusting = options.get("trust_remote_code") == "True" and (path.name, ast.unparse(call)) != ("merge.py", TRUSTED)
            assert not trusting, (path, name)
            assert options.get("allow_pickle") != "True", (path, name)


def test_names_in_a_checkpoints_manifest_lead_nowhere(adapter, tmp_path):
    run = Path(shutil.copytree(adapter.parent, tmp_path / "run"))
    path = run / "checkpoints" / "step-000001" / "manifest.json"
    for name in ("../../../secret", "/etc/passwd", "a\0b", "..", "link"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: "0" * 64}))
        newest, passed_over = run_module.newest_checkpoint(run / "checkpoints")
        assert newest is None
        assert "names files that are none of a checkpoint's" in passed_over[0]
