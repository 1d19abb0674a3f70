"""Which runs are read, and that what is not is said, with the reason."""

import json

import pytest
from synthetic_runs import change_result, write_curve, write_run, write_state

from etherdiff.results.runs import collect
from etherdiff.system.errors import UserError

SCORES = {"dino": 0.6, "clip_t": 0.25}


def left_out(paths, **options):
    return {one.name: one.why for one in collect(paths, **options).left_out}


def test_run_folders_are_found_at_any_depth_and_once(tmp_path):
    for name in ("sweep/runs/a", "sweep/runs/b", "c"):
        write_run(tmp_path / name, SCORES)
    (tmp_path / "sweep/runs/a/checkpoints/step-000100").mkdir(parents=True)
    (tmp_path / "sweep/runs/a/checkpoints/step-000100/run.yaml").write_text("a copy, and no run\n")
    found = collect([tmp_path, tmp_path / "sweep", tmp_path / "c"])
    assert sorted(run.name for run in found.runs) == ["a", "b", "c"]
    assert found.left_out == []


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("one/run", "two/run"):
        write_run(tmp_path / name, SCORES)
    assert {run.name for run in collect([tmp_path]).runs} == {str(tmp_path / "one/run"), str(tmp_path / "two/run")}


def test_subjects_in_folders_of_one_name_are_told_apart(tmp_path):
    dogs = [f"/photos/{owner}/dog" for owner in ("ann", "ben", "ben")]
    for number, dog in enumerate(dogs):
        write_run(tmp_path / f"dog-{number}", SCORES, subject=dog, seed=number)
    write_run(tmp_path / "cat", SCORES, subject="/photos/ann/cat")
    write_run(tmp_path / "unscored", subject="/photos/ben/dog")
    found = collect([tmp_path])
    assert [run.subject_name for run in found.runs] == ["cat", *dogs]
    assert [one.run.subject_name for one in found.left_out] == ["/photos/ben/dog"]
    for name, root in (("one", "/data/1"), ("two", "/data/2")):
        write_run(tmp_path / "named" / name, SCORES, subject="dog", data_root=root)
    assert [run.subject_name for run in collect([tmp_path / "named"]).runs] == ["/data/1/dog", "/data/2/dog"]


def test_a_subject_that_was_moved_between_runs_is_one(tmp_path):
    for seed, place in enumerate(("/home/ann/dog", "/cluster/dog")):
        run = write_run(tmp_path / str(seed), SCORES, subject=place, seed=seed)
        settings = run / "run.yaml"
        settings.write_text(settings.read_text().partition("\n")[2].replace("provenance:", "provenance:\n  images: abc"))
    assert [run.subject_name for run in collect([tmp_path]).runs] == ["dog", "dog"]


def cut(path):
    path.write_text(path.read_text()[:-40])


def retrained(run):
    change_result(run, lambda result: result["run"].update(step=100))


DAMAGES = {
    "its result is cut": (lambda run: cut(run / "eval/metrics.json"), "cannot be read"),
    "its result is something else": (lambda run: (run / "eval/metrics.json").write_text("[]"), "cannot be read"),
    "a score is no number": (
        lambda run: change_result(run, lambda result: result["scores"].update(dino={"mean": "much"})),
        "not what etherdiff eval writes (dino)",
    ),
    "a prompt is none": (lambda run: change_result(run, lambda result: result.update(per_prompt=[3])), "per_prompt"),
    "its settings are changed": (
        lambda run: (run / "run.yaml").write_text((run / "run.yaml").read_text().replace("steps: 300", "steps: 301")),
        "damaged: it is not what",
    ),
    "its settings are no YAML": (lambda run: (run / "run.yaml").write_text("a: [\n"), "not valid YAML"),
    "its settings are lost": (
        lambda run: ((run / "run.yaml").unlink(), (run / "adapter").mkdir()),
        "is not a run folder: it has no run.yaml",
    ),
    "it was trained on": (retrained, "it was scored at step 100, and now has 300"),
    "it is not scored": (lambda run: ((run / "eval/metrics.json").unlink(), (run / "adapter").mkdir()), "has not been scored"),
    "it has not finished": (lambda run: (run / "eval/metrics.json").unlink(), "it has not finished: etherdiff resume"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_cannot_be_used_is_named_with_the_reason(tmp_path, damage):
    write_run(tmp_path / "good", SCORES)
    change, reason = DAMAGES[damage]
    change(write_run(tmp_path / "bad", SCORES))
    told = left_out([tmp_path])
    assert list(told) == ["bad"]
    assert reason in told["bad"]


def test_what_a_sweep_says_of_its_failures_is_told(tmp_path):
    sweep = tmp_path / "sweep"
    write_run(sweep / "runs/good", SCORES)
    write_run(sweep / "runs/unfinished")
    write_state(sweep, "unfinished", "some lines\nerror: out of memory. Start again\n")
    write_state(sweep, "never-began", "error: subject: there is no such folder")
    assert left_out([sweep]) == {
        "unfinished": "it failed: out of memory. Start again",
        "never-began": "it failed: subject: there is no such folder",
    }


def test_a_diverged_run_is_known_as_one(tmp_path):
    sweep = tmp_path / "sweep"
    write_run(sweep / "runs/good", SCORES)
    write_curve(write_run(sweep / "runs/stopped"), [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None, "diverged": True}])
    write_state(sweep, "stopped", "error: the loss or its gradient is NaN or infinite at step 2; the weights are as they were")
    write_curve(write_run(sweep / "runs/of-0.1"), [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}])
    write_curve(write_run(sweep / "runs/recovered", SCORES), [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}])
    found = collect([sweep])
    assert {one.name for one in found.left_out if one.diverged} == {"stopped", "of-0.1"}
    assert {run.name for run in found.runs} == {"good", "recovered"}
    assert all(one.run is not None for one in found.left_out)


def test_a_run_that_skipped_a_step_and_died_of_something_else_did_not_diverge(tmp_path):
    write_run(tmp_path / "runs/good", SCORES)
    run = write_run(tmp_path / "runs/full-disk")
    rate = {"learning_rate": 1e-3}
    write_curve(run, [{"step": 1, "loss": 0.5} | rate, {"step": 2, "loss": None} | rate])
    log = "warning: step 2 was skipped: its loss or gradient is NaN or infinite\nerror: the disk is full"
    write_state(tmp_path, "full-disk", log)
    (one,) = collect([tmp_path]).left_out
    assert (one.why, one.diverged) == ("it failed: the disk is full", False)


def test_scores_are_not_asked_for_where_none_are_shown(tmp_path):
    write_run(tmp_path / "unscored")
    assert [run.name for run in collect([tmp_path], scored=False).runs] == ["unscored"]


def test_nothing_to_read_is_refused_with_the_reasons(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as raised:
        collect([tmp_path / "empty", tmp_path / "nowhere"])
    assert raised.value.problems == [
        f"{tmp_path / 'nowhere'}: there is no such folder",
        f"{tmp_path / 'empty'} holds no run folder",
    ]
    write_run(tmp_path / "unscored")
    with pytest.raises(UserError, match="left out: unscored: it has not finished"):
        collect([tmp_path / "unscored"])


def test_lines_of_a_damaged_log_are_passed_over(tmp_path):
    run = write_run(tmp_path / "run", SCORES)
    (run / "metrics.jsonl").write_text('[1]\n{"loss": 3}\n' + json.dumps({"step": 1, "loss": 0.5}) + "\n{torn")
    assert collect([tmp_path]).runs[0].curves == [{"step": 1, "loss": 0.5}]
