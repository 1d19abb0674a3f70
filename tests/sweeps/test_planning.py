"""From a sweep file to runs: resolved, named, and checked against data, networks and folders before anything starts."""

import re

import pytest
from sweeps.sweep_files import TINY, write_file

from etherdiff.config import DreamBoothConfig
from etherdiff.eval.best import find_scorer
from etherdiff.sweeps.planning import plan_units
from etherdiff.sweeps.runs import shell_command
from etherdiff.sweeps.spec import read_sweep
from etherdiff.system.errors import UserError
from etherdiff.tasks import plan_training

pytestmark = pytest.mark.filterwarnings("ignore")


def plan(tmp_path, output="out", **content):
    return plan_units(read_sweep(write_file(tmp_path / "mine.yaml", **content)), tmp_path / output)


def mistakes(tmp_path, **content) -> list[str]:
    with pytest.raises(UserError) as error:
        plan(tmp_path, **content)
    return [problem.split("mine.yaml: ", 1)[1] for problem in error.value.problems]


def test_a_run_is_what_training_would_record(tmp_path):
    (unit,) = plan(tmp_path, runs=[{"method": "oft"}])
    resolved = plan_training(
        DreamBoothConfig(**TINY, method="oft", output=tmp_path / "run"), find_scorer=find_scorer
    ).plan.config
    (run,) = unit.runs
    assert run.config == resolved.model_dump(mode="json", exclude={"output", "overwrite", "dry_run"})
    assert (run.config["blocks"], run.config["learning_rate"], run.config["class_noun"]) == (4, 6e-5, "ball")
    assert run.folder == tmp_path / "out/runs" / run.name


def test_a_name_follows_from_what_a_run_is_told_and_not_from_its_place(tmp_path):
    one, other = (plan(tmp_path, output, grid={"seed": [0, 1]}) for output in ("out", "elsewhere"))
    assert [unit.name for unit in one] == [unit.name for unit in other]
    longer = plan(tmp_path, settings={"steps": 4}, grid={"seed": [0, 1]})
    names = [unit.name for unit in one + longer]
    assert [name[:2] for name in names] == ["0-", "1-", "0-", "1-"]
    assert len(set(names)) == 4
    spelled_out = plan(tmp_path, settings={"learning_rate": 6e-3, "method": "ether+", "blocks": 1}, grid={"seed": [0, 1]})
    assert [unit.name for unit in spelled_out] == [unit.name for unit in one]  # it is the resolved configuration that counts


def test_a_run_on_top_of_one_that_is_not_there_yet_is_planned_as_if_it_were(tmp_path):
    alternative = {"method": "oft", "blocks": 2, "then": [{"refit": "{previous}", "steps": 2, "blocks": None}]}
    ((first, second),) = [unit.runs for unit in plan(tmp_path, task="s2i", runs=[alternative])]
    assert second.config["refit"] == str(first.folder)
    assert (second.config["blocks"], second.config["steps"]) == (2, 2)  # the blocks of the run that is re-fitted
    (elsewhere,) = plan(tmp_path, "elsewhere", task="s2i", runs=[alternative])
    assert [run.name for run in elsewhere.runs] == [first.name, second.name]


def test_a_run_that_nothing_can_be_put_on_top_of(tmp_path):
    (found,) = mistakes(tmp_path, task="s2i", runs=[{"method": "none", "then": [{"refit": "{previous}"}]}])
    assert re.search(r"out/runs/none-[0-9a-f]{8} has no adapter of layers", found)


def test_everything_wrong_with_any_run_in_one_message(tmp_path):
    found = mistakes(
        tmp_path,
        grid={"subject": ["candy_ball", "nobody"], "method": ["ether", "lora"]},
        settings={"blocks": 3, "resolution": 30},
    )
    assert len(found) == 4
    assert "subject 'nobody' is neither a folder nor a known name" in "".join(found)
    assert any("(run nobody-ether, and 1 more)" in line for line in found)
    assert "resolution: must be a multiple of 16 for this base, not 30" in "".join(found)


def test_the_same_run_twice(tmp_path):
    found = mistakes(tmp_path, runs=[{"method": "ether"}, {"method": "ether", "blocks": 1}])
    assert found == ["ether and ether-1 are the same run: leave one out"]


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"num": 0}, "eval: num: must be at least 1, not 0"),
        ({"metrics": "dino,beauty"}, "eval: metric 'beauty': there are"),
        ({"checkpoint": "step-2"}, "eval: checkpoint: 3 steps with one every 200 have no step-2"),
        ({"checkpoint": "best"}, "eval: checkpoint: there is no best where nothing scores along the way"),
        ({"checkpoint": "first"}, "eval: checkpoint: must be last, best or step-N, not 'first'"),
        ({"prompts": "none.txt"}, "eval: "),
        ({"metrics": "fid"}, "eval: fid: 5 real and 25 generated images"),
        ({"backbone": ["clip=./nowhere"]}, "eval: clip: ./nowhere is neither a local folder nor a name"),
    ],
)
def test_what_scoring_would_stumble_over(tmp_path, told, sentence):
    (found,) = mistakes(tmp_path, eval={"num": 1, **told}, grid={"seed": [0, 1]})
    assert found.startswith(sentence)


def test_what_scoring_maps_would_stumble_over(tmp_path):
    found = mistakes(tmp_path, task="s2i", eval={"num_maps": 1_000_000, "metrics": ["miou", "dino"]})
    assert [problem.split(":")[1].strip() for problem in found] == ["metric 'dino'", "num_maps"]


def test_the_commands(tmp_path):
    (unit,) = plan(tmp_path, resources={"cpus": 2})
    (run,) = unit.runs
    assert run.make_command() == ["train-dreambooth", "--config", str(run.recipe), "--output", str(run.folder)]
    assert run.score_command() == ["eval", str(run.folder), "--steps", "2", "--num", "1", "--overwrite"]
    assert shell_command(unit, run.resume_command()).startswith("OMP_NUM_THREADS=2 CUDA_VISIBLE_DEVICES= ")
    (with_gpu,) = plan(tmp_path, resources={"gpus": 0.5})
    assert with_gpu.environment() == {"OMP_NUM_THREADS": "1"}  # which GPU is for Ray or SLURM to say
