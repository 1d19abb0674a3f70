"""Reading sweep files: which runs they ask for, and everything that is wrong with them at once."""

import pytest
import yaml

from etherdiff.config import ControlEvalOptions, Resources, SubjectEvalOptions
from etherdiff.sweeps.runs import SweepRun
from etherdiff.sweeps.spec import read_sweep
from etherdiff.system.errors import UserError


@pytest.fixture
def read(tmp_path):
    """The sweep of a file with this content."""

    def read_content(content):
        path = tmp_path / "mine.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return read_sweep(path)

    return read_content


def mistakes(read, content) -> list[str]:
    with pytest.raises(UserError) as error:
        read(content)
    return [problem.split("mine.yaml: ", 1)[1] for problem in error.value.problems]


def test_every_combination_of_the_grid_with_every_alternative(read):
    content = {
        "task": "dreambooth",
        "settings": {"base": "tiny"},
        "grid": {"subject": ["a", "b"], "seed": [0, 1]},
        "runs": [{"method": "ether"}, {"method": "oft", "blocks": 2}],
    }
    sweep = read(content)
    told = [(run.config.subject, run.config.seed, run.config.method, run.config.blocks) for (run,) in sweep.units]
    assert told == [(subject, seed, *method) for subject in "ab" for seed in (0, 1) for method in (("ether", None), ("oft", 2))]
    assert [run.label for (run,) in sweep.units][:3] == ["a-0-ether", "a-0-oft-2", "a-1-ether"]
    assert (sweep.size, sweep.task, sweep.resources) == (8, "dreambooth", Resources(cpus=1, gpus=0))


def test_runs_on_top_of_a_run_are_in_its_unit(read):
    then = [{"refit": "{previous}", "steps": 60}, {"refit": "{previous}", "steps": 10}]
    content = {"task": "s2i", "settings": {"dataset": "tiny", "steps": 99}, "runs": [{"method": "oft", "then": then}]}
    ((first, second, third),) = read(content).units
    assert [str(run.config.refit) for run in (first, second, third)] == ["None", "{previous}", "{previous}"]
    assert [run.config.steps for run in (first, second, third)] == [99, 60, 10]
    assert second.config.method == "oft"  # what the run before says holds until something else is said
    assert [run.label for run in (first, second, third)] == ["oft", "oft-refit-60", "oft-refit-10"]


def test_the_nearer_word_wins(read, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/ether.yaml").write_text("seed: 1\nsteps: 1\nblocks: 1\nrank: 1\nprovenance: {task: dreambooth}\n")
    content = {
        "task": "dreambooth",
        "recipe": "recipes/{method}.yaml",
        "settings": {"steps": 2, "blocks": 2, "rank": None, "subject": "dog", "batch_size": 2},
        "grid": {"blocks": [3]},
        "runs": [{"method": "ether", "batch_size": 4}],
    }
    ((run,),) = read(content).units
    told = run.config
    assert (told.seed, told.steps, told.blocks, told.batch_size) == (1, 2, 3, 4)
    assert told.rank is None  # null takes a recipe's value back


def test_one_run_needs_no_grid(read):
    ((run,),) = read("task: dreambooth\nsettings: {subject: dog}\n").units
    assert run.label == "run"


@pytest.mark.parametrize(
    ("varied", "label"),
    [
        ({"subject": "/photos/my dog"}, "my-dog"),
        ({"learning_rate": 1e-05, "method": "ether+one-sided"}, "1e-05-ether+one-sided"),
        ({"flip": True, "prior_preservation": False, "rank": None}, "with-flip-no-prior_preservation-default-rank"),
    ],
)
def test_labels_are_file_names(read, varied, label):
    ((run,),) = read({"task": "dreambooth", "settings": {"subject": "dog"}, "runs": [varied]}).units
    assert run.label == label


def test_scoring_is_what_eval_is_told(read, tmp_path):
    told = {
        "num": 3,
        "steps": 20,
        "metrics": ["dino", "clip_t"],
        "base": False,
        "plain_clip_t": True,
        "backbone": ["clip=a", "dino=b"],
    }
    scoring = read({"task": "dreambooth", "settings": {"subject": "dog"}, "eval": told}).scoring
    assert isinstance(scoring, SubjectEvalOptions)
    run = SweepRun("dog", tmp_path, "dreambooth", {}, scoring)
    flags = "--metrics dino,clip_t --backbone clip=a --backbone dino=b --steps 20 --num 3 --plain-clip-t --no-base"
    assert run.score_command() == ["eval", str(run.folder), *flags.split(), "--overwrite"]
    assert run.scoring_record() == {**told, "metrics": "dino,clip_t"}


def test_a_state_knows_options_however_they_were_written(tmp_path):
    run = SweepRun("dog", tmp_path, "dreambooth", {}, SubjectEvalOptions(metrics="dino, clip_t", num=4))
    for record in (run.scoring_record(), {"metrics": "dino,clip_t", "num": 4}, {"metrics": ["dino", "clip_t"], "base": True}):
        assert run.is_scored_with(record)
    for record in ({}, None, {"metrics": "dino,clip_t", "num": 3}, {"metrics": "clip_t,dino"}, {"unknown": 1}):
        assert not run.is_scored_with(record)
    assert not SweepRun("dog", tmp_path, "dreambooth", {}, None).is_scored_with({})


def test_scoring_by_default_and_not_at_all(read):
    of_maps = {"task": "s2i", "settings": {"dataset": "tiny"}}
    assert read(of_maps).scoring == ControlEvalOptions()
    assert read(of_maps | {"eval": True}).scoring == ControlEvalOptions()
    assert read(of_maps | {"eval": False}).scoring is None


GOOD = {"task": "dreambooth", "settings": {"subject": "dog"}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"task": "paint"}, "task: must be dreambooth, s2i, perturb, not 'paint'"),
        ({"grids": {}}, "grids: there is no such option; did you mean grid?"),
        ({"grid": {"seed": 3}}, "grid.seed: must be a valid list, not 3"),
        ({"grid": {"seed": []}}, "grid: seed has no values"),
        ({"grid": {"seed": [1, 1]}}, "grid: seed has the value 1 twice"),
        ({"grid": {"sed": [1, 2]}}, "sed: there is no such option; did you mean seed?"),
        ({"grid": {"seed": [0]}, "runs": [{"seed": 1}]}, "seed: must not be both in grid and in runs"),
        (
            {"grid": {"seed": [0, "many"]}},
            "seed: must be a valid integer, unable to parse string as an integer, not 'many' (run many)",
        ),
        ({"runs": []}, "runs: List should have at least 1 item after validation, not 0, not []"),
        ({"runs": [{"then": {"steps": 3}}]}, "runs: then must be a list of runs, each with its own options"),
        ({"runs": [{"then": [3]}]}, "runs: each run under then must be `key: value` options, without another then"),
        ({"runs": [{"subject": "{previous}"}]}, "{previous} stands for the folder of the run before: use it under then"),
        ({"runs": [{"output": "x"}]}, "output: the sweep chooses it itself; leave it out"),
        (
            {"grid": {"seed": list(range(101)), "steps": list(range(1, 101))}},
            "10,100 runs are asked for; a sweep has at most 10,000",
        ),
        ({"recipe": "{method}.yaml"}, "recipe: {method}.yaml needs method, which the run does not say"),
        ({"resources": {"cpus": 0}}, "resources: cpus: must be at least 1, not 0"),
        ({"resources": {"gpu": 1}}, "resources: gpu: there is no such option; did you mean gpus?"),
        ({"resources": {"gpus": 1.5}}, "resources: gpus: must be a fraction of one, or a whole number, not 1.5"),
        ({"eval": {"metric": "dino"}}, "eval: metric: there is no such option; did you mean metrics?"),
    ],
)
def test_a_mistake_and_how_to_mend_it(read, change, sentence):
    assert mistakes(read, GOOD | change) == [sentence]


def test_a_recipe_that_is_not_there(read, tmp_path):
    found = mistakes(read, GOOD | {"recipe": "none.yaml", "grid": {"seed": [0, 1]}})
    assert found == [f"{tmp_path}/none.yaml: there is no such recipe file"]  # once, not for each run


def test_all_mistakes_in_one_message(read):
    found = mistakes(read, {"task": "paint", "grid": {"seed": []}, "resources": {"cpus": 0}})
    assert [line.split(":")[0] for line in found] == ["task", "grid", "resources"]
    found = mistakes(read, GOOD | {"grid": {"seed": [0, -1], "steps": [0, 5]}, "runs": [{"flipp": True}]})
    assert found == [
        "steps: must be at least 1, not 0 (run 0-0-with-flipp, and 1 more)",
        "flipp: there is no such option; did you mean flip?",
        "seed: must be at least 0, not -1 (run 1-0-with-flipp, and 1 more)",
    ]


@pytest.mark.parametrize("content", ["", "[1, 2]", "task: &a dreambooth\nx: *a", "task: [", "1: 2"])
def test_what_is_no_sweep_file(read, content):
    with pytest.raises(UserError, match=r"mine\.yaml: "):
        read(content)


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(UserError, match="there is no such sweep file"):
        read_sweep(tmp_path / "none.yaml")
