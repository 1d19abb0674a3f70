"""What `Run` reads from a run folder, and how it refuses what is none."""

import json

import pytest
import yaml

from etherdiff.config import DreamBoothConfig, PerturbConfig, S2IConfig
from etherdiff.runs.folder import RunFolder, write_manifest, write_settings
from etherdiff.runs.run import Run, recorded_processes
from etherdiff.system.errors import UserError

FACTS = {
    "processes": 2,
    "device": "cpu",
    "base": {"name": "tiny", "path": "/bases/tiny", "fingerprint": {"unet": "abc"}},
    "images": "0123",
    "subject_prompt": "a photo of sks ball",
    "class_prompt": "a photo of ball",
}
CONFIGS = {
    "dreambooth": DreamBoothConfig(base="tiny", subject="/photos/ball", class_noun="ball", steps=3),
    "s2i": S2IConfig(base="tiny", dataset="tiny", method="oft", steps=3),
    "perturb": PerturbConfig(base="tiny", subject="ball", method="naive", distance=2),
}


def write(path, task="dreambooth", config=None):
    path.mkdir(parents=True, exist_ok=True)
    write_settings(RunFolder(path), task, config or CONFIGS[task], FACTS)
    return path


@pytest.mark.parametrize(
    ("task", "subject", "label", "controlled", "results"),
    [
        ("dreambooth", "ball", "ether+", False, ["adapter"]),
        ("s2i", "tiny", "oft", True, ["adapter", "control_encoder"]),
        ("perturb", "ball", "naive", False, ["adapter"]),
    ],
)
def test_a_run_of_each_task(tmp_path, task, subject, label, controlled, results):
    run = Run.open(write(tmp_path / "a run", task))
    assert (run.name, run.task, run.subject_name, run.method_label) == ("a run", task, subject, label)
    assert run.is_controlled == controlled
    assert [path.name for path in run.results] == results
    assert run.config == CONFIGS[task].model_copy(update={"output": tmp_path / "a run"})
    assert (run.provenance.processes, run.provenance.base.fingerprint) == (2, {"unet": "abc"})
    assert (run.result, run.best, run.scores, run.curves, run.diverged) == (None, None, {}, [], False)


def test_a_method_that_was_fitted_again_has_a_name_of_its_own(tmp_path):
    config = CONFIGS["s2i"].model_copy(update={"refit": tmp_path})
    run = Run.open(write(tmp_path / "run", "s2i", config))
    assert run.method_label == "oft+magnitude"
    assert [path.name for path in run.results] == ["refitted_adapter", "adapter", "control_encoder"]


def test_a_control_encoder_alone_has_no_adapter(tmp_path):
    run = Run.open(write(tmp_path / "run", "s2i", CONFIGS["s2i"].model_copy(update={"method": "none"})))
    assert [path.name for path in run.results] == ["control_encoder"]


def test_a_resumed_run_records_the_same_bytes_again(tmp_path):
    path = write(tmp_path / "run")
    run = Run.open(path)
    write_settings(run.folder, run.task, run.config, run.provenance.content())
    before = (path / "run.yaml").read_bytes()
    run = Run.open(path)
    write_settings(run.folder, run.task, run.config, run.provenance.content())
    assert (path / "run.yaml").read_bytes() == before
    assert list(run.provenance.content()) == ["task", "versions", "threads", *FACTS]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.pop("provenance"), "is not what a run wrote"),
        (lambda content: content["provenance"].update(task="unknown"), "is not what a run wrote"),
        (lambda content: content["provenance"].update(processes="two"), "is not what a run wrote"),
        (lambda content: content.update(provenance=3), "is not what a run wrote"),
        (lambda content: content.update(former_option=1), "cannot be used (former_option: there is no such option"),
    ],
)
def test_what_no_run_wrote_is_refused_in_one_line_with_a_way_out(tmp_path, change, said):
    path = write(tmp_path / "run")
    content = yaml.safe_load((path / "run.yaml").read_text())
    change(content)
    (path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError) as raised:
        Run.open(path)
    assert len(raised.value.problems) == 1
    assert "\n" not in str(raised.value)
    assert said in str(raised.value)
    assert "start the run again" in str(raised.value)
    assert recorded_processes(path) == 1


def test_a_run_that_no_longer_fits_is_said_to_be_of_another_version(tmp_path):
    path = write(tmp_path / "run")
    content = yaml.safe_load((path / "run.yaml").read_text()) | {"former_option": 1}
    content["provenance"]["versions"]["etherdiff"] = "0.1.0"
    (path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"made by etherdiff 0\.1\.0; use that version"):
        Run.open(path)


def test_a_folder_without_settings_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder: it has no run\.yaml"):
        Run.open(tmp_path)


def test_a_run_is_finished_when_its_results_are_whole_and_its_steps_done(tmp_path):
    run = Run.open(write(tmp_path / "run"))
    with pytest.raises(UserError, match=r"has no adapter yet: the run has not finished \(etherdiff resume"):
        run.check_results()
    run.folder.adapter.mkdir()
    (run.folder.adapter / "weights").write_text("1")
    run.check_results()
    assert not run.is_finished  # nothing is recorded of the result
    write_manifest(run.folder.adapter)
    run.folder.cost.write_text(json.dumps({"steps": 2}))
    assert not run.is_finished
    run.folder.cost.write_text(json.dumps({"steps": 3}))
    assert run.is_finished
    (run.folder.adapter / "weights").write_text("2")
    assert not run.is_finished
    with pytest.raises(UserError, match="damaged or changed"):
        run.check_results()


def test_of_several_lines_for_a_step_the_later_adds_to_the_earlier(tmp_path):
    run = Run.open(write(tmp_path / "run"))
    lines = [
        '{"step": 2, "loss": 2, "dino": 0.5}',
        "[1]",
        '{"loss": 3}',
        '{"step": 1, "loss": 1}',
        '{"step": 2, "loss": 4}',
        "{to",
    ]
    run.folder.metrics.write_text("\n".join(lines))
    assert run.curves == [{"step": 1, "loss": 1}, {"step": 2, "loss": 4, "dino": 0.5}]


@pytest.mark.parametrize(
    ("last", "diverged"),
    [
        ({"step": 2, "loss": None, "diverged": True}, True),
        ({"step": 2, "loss": None}, True),  # as version 0.1 recorded it
        ({"step": 2, "loss": None, "learning_rate": 1e-3}, False),  # a step that was skipped
        ({"step": 2, "loss": 0.5, "learning_rate": 1e-3}, False),
        ({"step": 2, "validation_loss": 0.5}, False),
    ],
)
def test_whether_a_run_diverged_is_a_fact_of_its_last_line(tmp_path, last, diverged):
    run = Run.open(write(tmp_path / "run"))
    run.folder.metrics.write_text("\n".join(json.dumps(row) for row in ({"step": 1, "loss": None, "diverged": True}, last)))
    assert run.diverged == diverged
