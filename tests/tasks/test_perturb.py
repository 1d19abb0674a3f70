"""`etherdiff perturb`: run folders with random transformations, and what the other commands make of them."""

import math
import subprocess
import sys

import pytest
import torch
import yaml
from subject_photos import draw_subject

from etherdiff.adapters.analysis import adapter_drift
from etherdiff.adapters.io import load_adapter
from etherdiff.config import PerturbConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.runs.folder import check_result, is_sealed
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.locks import run_lock
from etherdiff.tasks.image_sets import find_trained
from etherdiff.tasks.perturb import perturb, plan_perturbation


@pytest.fixture
def config(tmp_path):
    draw_subject(tmp_path / "ball")

    def make(**options) -> PerturbConfig:
        settings = {"base": "tiny", "subject": str(tmp_path / "ball"), "class_noun": "ball", "output": tmp_path / "run"}
        return PerturbConfig(**(settings | options))

    return make


def drifts(path):
    return adapter_drift(load_adapter(load_base(find_base("tiny")).unet, path / "adapter")).values()


@pytest.mark.parametrize(
    ("method", "distance", "blocks"), [("ether", None, 1), ("ether+", 0.8, 2), ("oft", 3.0, 4), ("naive", 9.0, 4)]
)
def test_it_makes_an_ordinary_run_folder(config, method, distance, blocks):
    path = perturb(config(method=method, distance=distance, blocks=blocks))
    expected = math.sqrt(blocks) * (2.0 if distance is None else distance)
    found = [drift.input_side for drift in drifts(path)]
    assert found == [pytest.approx(expected, rel=1e-5)] * 56  # layers of the tiny base's attention
    opened = Run.open(path)
    run, settings, provenance = opened.folder, opened.config, opened.provenance.content()
    assert is_sealed(run.settings)
    assert provenance["task"] == "perturb"
    assert isinstance(settings, PerturbConfig)
    assert (settings.distance, settings.steps) == (distance or 2.0, 0)
    check_result(run, run.adapter)
    assert sorted(found.name for found in path.iterdir()) == ["adapter", "adapter.sha256.json", "run.yaml"]
    assert "steps" not in yaml.safe_load(run.settings.read_text())


def test_the_seed_decides_it_and_nothing_is_overwritten_unasked(config, tmp_path):
    settings = config(method="ether+", distance=1)
    weights = perturb(settings) / "adapter" / "adapter_model.safetensors"
    first = weights.read_bytes()
    with pytest.raises(UserError, match="holds a run"):
        perturb(settings)
    torch.manual_seed(5)  # the global generator has no say
    perturb(config(method="ether+", distance=1, overwrite=True))
    assert weights.read_bytes() == first
    perturb(config(method="ether+", distance=1, seed=1, overwrite=True))
    assert weights.read_bytes() != first
    assert not list(tmp_path.glob(".*"))


def test_the_run_is_its_own_recipe(config):
    plan = plan_perturbation(config(method="naive", distance=2))
    again = plan_perturbation(PerturbConfig(**plan.config.model_dump()))
    assert plan.config == again.config
    assert plan.config.blocks == 4


def test_two_at_once_are_refused(config, tmp_path):
    with run_lock(tmp_path / "run"), pytest.raises(UserError, match="in use by"):
        perturb(config(method="ether"))


def test_every_mistake_is_in_one_message(config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError) as caught:
        perturb(config(method="ether", distance=1, class_noun=None))
    said = "\n".join(caught.value.problems)
    for part in ("class_noun: say what", "always at 2 from the identity, not 1", "output:"):
        assert part in said
    with pytest.raises(UserError, match="distance: say how far naive's"):
        plan_perturbation(config(method="naive", output=None))
    with pytest.raises(UserError, match="do not divide into 7 blocks"):
        plan_perturbation(config(method="ether+", distance=1, blocks=7, output=None))


def test_there_is_nothing_but_the_last_of_it(config, tmp_path):
    path = perturb(config(method="ether"))
    run = Run.open(path)
    assert find_trained(run, "last").step == 0
    for name in ("best", "step-1"):
        with pytest.raises(UserError, match="there is only its last"):
            find_trained(run, name)
    from etherdiff.run import resume

    with pytest.raises(UserError, match="nothing to go on with"):
        resume(path)
    assert not list(path.glob(".*"))


@pytest.mark.slow
def test_the_other_commands_work_on_it(config, tmp_path):
    """By the command line, as a sweep runs it."""

    def etherdiff(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "etherdiff", *map(str, arguments)], check=True)

    (tmp_path / "recipe.yaml").write_text("base: tiny\nsubject: candy_ball\nmethod: ether+\ndistance: 1.2\n")
    run = tmp_path / "candy"
    etherdiff("perturb", "--config", tmp_path / "recipe.yaml", "--output", run)
    etherdiff("eval", run, "--num", 1, "--steps", 2, "--metrics", "dino,clip_t")
    result = yaml.safe_load((run / "eval/metrics.json").read_text())
    assert (result["run"]["method"], result["run"]["step"]) == ("ether+", 0)
    assert result["paper"]["scores"]["dino"]["differs"][0] == "the transformation is random, not trained"
    assert (run / "report.html").is_file()
    etherdiff("generate", "--run", run, "--prompt", "a sks ball", "--num", 1, "--steps", 2, "--output", tmp_path / "pictures")
    etherdiff("merge", run, "--output", tmp_path / "merged")
    etherdiff("export", run, "--output", tmp_path / "lora.safetensors")
