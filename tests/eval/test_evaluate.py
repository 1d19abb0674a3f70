"""`etherdiff eval`: which images are drawn, taken up again or refused, and what it leaves and prints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from eval_runs import build_networks, build_run
from PIL import Image
from rich.console import Console

from etherdiff import cli
from etherdiff.config import ControlEvalOptions, SubjectEvalOptions, read_config
from etherdiff.eval.evaluate import evaluate, plan_evaluation, render
from etherdiff.eval.paper import paper_of_subject
from etherdiff.images.writing import read_png_settings
from etherdiff.runs.run import Run
from etherdiff.system.errors import RunError, UserError
from etherdiff.tasks import subject_sets
from etherdiff.tasks.subjects import EvalPrompt, make_prompts

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a {identifier} {class_noun} in the snow", "a red sks ball"]
FOLDERS = ["000-a-sks-ball-in-the-snow", "001-a-red-sks-ball"]
BASE_FOLDERS = ["000-a-ball-in-the-snow", "001-a-red-ball"]
IMAGES = ["images/000-a-sks-ball-in-the-snow/0.png", "images/000-a-sks-ball-in-the-snow/1.png"]


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    return build_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A run that nobody writes into."""
    return build_run(tmp_path_factory.mktemp("built") / "run")


@pytest.fixture
def run(built, tmp_path):
    shutil.copytree(built, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def options(networks, tmp_path):
    """Two prompts, two images each, two denoising steps."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    backbones = tuple(f"{role}={folder}" for role, folder in networks.items())

    def make(**changes):
        settings = {"prompts": prompts, "num": 2, "steps": 2, "device": "cpu", "backbone": backbones, "base": False}
        return SubjectEvalOptions(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def scored(built, networks, tmp_path_factory):
    """The same run, judged beside its base; read it only."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(built, folder / "run")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    backbones = tuple(f"{role}={path}" for role, path in networks.items())
    options = SubjectEvalOptions(prompts=folder / "prompts.txt", num=2, steps=2, device="cpu", backbone=backbones)
    return folder / "run", options, evaluate(Run.open(folder / "run"), options)


def pngs(run, name="images"):
    """The images of a set, by their place in it, and their bytes."""
    folder = run / "eval" / name
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


def count_drawn(monkeypatch):
    drawn = []
    sample = subject_sets.sample

    def counted(pipeline, prompt, seeds, *more):
        drawn.append((prompt, list(seeds)))
        return sample(pipeline, prompt, seeds, *more)

    monkeypatch.setattr(subject_sets, "sample", counted)
    return drawn


def subject_of(run):
    return next(line.split(": ", 1)[1] for line in (run / "run.yaml").read_text().splitlines() if line.startswith("subject: "))


def move_subject(run, subject):
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(f"subject: {subject_of(run)}", f"subject: {subject}"))


# --- What it leaves ----------------------------------------------------------------------------------------------------


def test_images_lie_by_prompt_and_seed_and_say_how_they_were_made(scored):
    run, _, result = scored
    assert set(pngs(run)) == {f"{folder}/{seed}.png" for folder in FOLDERS for seed in (0, 1)}
    assert set(pngs(run, "base_images")) == {f"{folder}/{seed}.png" for folder in BASE_FOLDERS for seed in (0, 1)}
    said = read_png_settings(run / "eval" / IMAGES[1])
    assert (said["prompt"], said["seed"], said["steps"]) == ("a sks ball in the snow", 1, 2)
    assert said["adapter_sha256"] == result["run"]["adapter_sha256"]
    assert pngs(run) != pngs(run, "base_images")


def test_metrics_json_has_the_scores_of_the_run_and_of_its_base(scored):
    run, _, result = scored
    assert json.loads((run / "eval/metrics.json").read_text()) == result
    for scores in (result["scores"], result["base"]["scores"]):
        assert {"dino", "clip_i", "clip_t", "lpips_to_real", "lpips_diversity"} <= set(scores)
        assert scores["dino"]["n"] == 4
    assert result["scores"]["dino"]["mean"] != result["base"]["scores"]["dino"]["mean"]
    identity, base = (one["scores"]["clip_t"]["identity"] for one in (result, result["base"]))
    assert identity["prompts"] == base["prompts"]  # one text for both, whatever the images were drawn from
    assert (identity["generation"]["drawn_from"], base["generation"]["drawn_from"]) == (
        "prompts with identifier",
        "prompts without identifier",
    )
    assert identity["generation"]["sampler"] == "DPM++ 2M"
    assert result["run"] | {"method": "ether+", "checkpoint": "last", "step": 1, "subject": "ball"} == result["run"]
    assert set(json.loads((run / "eval/cost.json").read_text())["seconds"]) == {"load", "images", "base_images", "score"}


def test_a_second_time_draws_nothing_and_finds_the_same(scored, monkeypatch):
    run, options, result = scored
    monkeypatch.setattr(subject_sets, "load_base", None)
    assert evaluate(Run.open(run), options) == result


def test_a_table_for_people(scored):
    _, _, result = scored
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(render(result))
    text = console.export_text()
    for part in ("dino", f"{result['scores']['dino']['mean']:.4f}", "the base", "real images", "95% interval", "other images"):
        assert part in text
    assert "paper" not in text


def test_json_on_stdout_and_nothing_else(scored, monkeypatch, capsys):
    run, options, result = scored
    flags = [f"--backbone={text}" for text in options.backbone]
    arguments = ["eval", run, "--json", "--num", 2, "--steps", 2, "--prompts", options.prompts, "--device", "cpu", *flags]
    monkeypatch.setattr(sys, "argv", ["etherdiff", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert json.loads(capsys.readouterr().out) == result


def test_held_out_images_are_scored_beside(run, options):
    subject = run.parent / "ball"
    shutil.copytree(subject_of(run), subject)
    (subject / "held_out").mkdir()
    shutil.move(sorted(subject.glob("*.png"))[-1], subject / "held_out")
    move_subject(run, subject)
    scores = evaluate(Run.open(run), options(metrics=("dino",)))["scores"]
    assert set(scores) == {"dino", "dino_held_out", "dino_real_images"}
    assert scores["dino_held_out"]["identity"]["reference"] == scores["dino_held_out"]["identity"]["reference"] | {
        "images": "held-out images",
        "n": 1,
    }


# --- Going on ----------------------------------------------------------------------------------------------------------


def test_killed_and_started_again_it_draws_what_is_missing_and_the_same_bytes(scored, run, options, tmp_path):
    """In a process of its own, killed at its first image."""
    whole, done, result = scored
    arguments = ["eval", run, "--num", 2, "--steps", 2, "--prompts", done.prompts, "--device", "cpu", "--no-base"]
    command = [sys.executable, "-m", "etherdiff", *map(str, arguments), *(f"--backbone={text}" for text in done.backbone)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not pngs(run) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "eval/metrics.json").exists()
    again = evaluate(Run.open(run), options())
    assert pngs(run) == pngs(whole)
    assert again["scores"] == result["scores"]


def test_only_batches_with_a_missing_image_are_drawn_and_whole_images_are_left_alone(scored, run, options, monkeypatch):
    whole, _, _ = scored
    shutil.copytree(whole / "eval", run / "eval")
    gone, cut, kept = (run / "eval" / place for place in (IMAGES[0], "images/001-a-red-sks-ball/0.png", IMAGES[1]))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:100])
    before = kept.stat().st_mtime_ns
    drawn = count_drawn(monkeypatch)
    evaluate(Run.open(run), options())
    assert drawn == [("a sks ball in the snow", [0, 1]), ("a red sks ball", [0, 1])]
    assert pngs(run) == pngs(whole)
    assert kept.stat().st_mtime_ns == before


def test_black_and_unreadable_images_are_counted_not_drawn_again(scored, run, options):
    whole, _, _ = scored
    shutil.copytree(whole / "eval", run / "eval")
    Image.new("RGB", (64, 64)).save(run / "eval" / IMAGES[0])
    result = evaluate(Run.open(run), options())
    assert result["left_out"]["black"] == [{"kind": "generated", "prompt": "a sks ball in the snow", "seed": 0}]
    assert result["scores"]["dino"]["n"] == 3
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(render(result))
    assert "the run: left out, black: 1" in console.export_text()


def test_images_of_other_settings_are_not_taken(scored, run, options, monkeypatch):
    whole, _, _ = scored
    shutil.copytree(whole / "eval", run / "eval")
    with pytest.raises(UserError, match=r"other settings \(seeds\).*--overwrite"):
        evaluate(Run.open(run), options(seed=5))
    with pytest.raises(UserError, match=r"steps: 2, here 3"):
        evaluate(Run.open(run), options(steps=3))
    (run / "eval/settings.json").unlink()
    with pytest.raises(UserError, match="nothing says how they were made"):
        evaluate(Run.open(run), options())


def test_another_adapter_needs_new_images_but_not_of_the_base(scored, run, options, monkeypatch):
    whole, _, result = scored
    shutil.copytree(whole / "eval", run / "eval")
    with pytest.raises(UserError, match=r"images made with other settings \(adapter: "):
        evaluate(Run.open(run), options(checkpoint="step-1"))
    drawn = count_drawn(monkeypatch)
    again = evaluate(Run.open(run), options(checkpoint="step-1", overwrite=True, base=True))
    assert [text for text, _ in drawn] == ["a sks ball in the snow", "a red sks ball"]
    # the checkpoint holds the same weights as the adapter
    assert again["scores"]["dino"]["mean"] == pytest.approx(result["scores"]["dino"]["mean"], abs=1e-4)
    assert again["run"]["checkpoint"] == "step-1"


def test_images_are_overwritten_only_when_others_can_be_drawn(scored, run, options, monkeypatch):
    whole, _, _ = scored
    shutil.copytree(whole / "eval", run / "eval")
    before = {path: path.read_bytes() for path in (run / "eval").rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise RunError("not finite")

    monkeypatch.setattr(subject_sets, "sample", fail)
    with pytest.raises(RunError, match="not finite"):
        evaluate(Run.open(run), options(steps=3, overwrite=True))
    assert before.items() <= {path: path.read_bytes() for path in (run / "eval").rglob("*") if path.is_file()}.items()


def test_steps_beyond_the_schedule_are_refused(run, options):
    with pytest.raises(UserError, match="steps: the base's noise schedule allows at most 998, not 999"):
        evaluate(Run.open(run), options(steps=999))


def test_where_nothing_is_missing_the_batch_size_does_not_matter(scored, run, options):
    whole, _, result = scored
    shutil.copytree(whole / "eval", run / "eval")
    again = evaluate(Run.open(run), options(batch_size=1))
    assert again["scores"] == result["scores"]
    assert again["drawn"]["images"] == result["drawn"]["images"]  # what they were drawn with, not what was asked for now
    assert again["drawn"]["images"]["batch_size"] == 4
    (run / "eval" / IMAGES[0]).unlink()
    with pytest.raises(UserError, match=r"batch_size: 4, here 1"):
        evaluate(Run.open(run), options(batch_size=1))


# --- Prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_lose_their_identifier_as_a_word():
    assert make_prompts(["a photo of {identifier} {class_noun}", "sks, the dog", "a sksy dog"], "sks", "dog") == (
        EvalPrompt("a photo of sks dog", "a photo of dog"),
        EvalPrompt("sks, the dog", ", the dog"),
        EvalPrompt("a sksy dog", "a sksy dog"),
    )
    assert make_prompts(["a (s.k) dog"], "(s.k)", "dog")[0].plain == "a dog"


def test_without_a_file_they_are_the_25_of_what_the_base_knows(run, options):
    plan = plan_evaluation(Run.open(run), options(prompts=None, num=4))
    assert len(plan.sets.prompts) == 25
    assert plan.sets.prompts[0] == EvalPrompt("a sks ball on grass", "a ball on grass")
    images = plan.sets["images"]
    assert ([picture.seed for picture in images.pictures[:5]], images.generation["resolution"]) == ([0, 1, 2, 3, 0], 64)


# --- Beside the paper ----------------------------------------------------------------------------------------------------


def as_the_paper():
    preprocessing = {"edge": None, "size": [224, 224], "crop": None}
    backbone = {
        "name": "facebook/dino-vits16",
        "feature": "CLS token of the last hidden state",
        "preprocessing": preprocessing,
    }
    return {"dino": {"identity": {"backbone": backbone}}}


def paper_sets(width=768, **changes):
    """As the paper's images were drawn, but for changes."""
    return SimpleNamespace(
        base=SimpleNamespace(config=lambda _: {"cross_attention_dim": width}),
        config=SimpleNamespace(method="ether+"),
        options=SubjectEvalOptions(**changes),
    )


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (paper_sets(), None),
        (paper_sets(width=32), "not Stable Diffusion 1.5"),
        (paper_sets(num=1), "not 4 images"),
        (paper_sets(prompts="file"), "not 4 images"),
        (paper_sets(steps=10), "10 denoising steps"),
    ],
)
def test_the_papers_row_stands_beside_only_where_the_setting_is_the_same(sets, reason):
    found = paper_of_subject(sets, as_the_paper())["scores"]["dino"]
    assert found["value"] == 0.666
    assert (found["differs"] == []) if reason is None else (reason in found["differs"][0])


# --- Refusals ------------------------------------------------------------------------------------------------------------


def refused(run, options):
    with pytest.raises(UserError) as raised:
        evaluate(Run.open(run), options)
    return raised.value.problems


def test_everything_wrong_comes_in_one_message(run, options, tmp_path):
    shutil.rmtree(run / "adapter")
    move_subject(run, tmp_path / "nowhere")
    wrong = options(metrics=("dino", "beauty"), preset="mine", backbone=("dino",), prompts=tmp_path / "no.txt")
    problems = "\n".join(refused(run, wrong))
    for part in ("'beauty'", "'mine'", "ROLE=NAME", "no.txt", "has not finished", "nowhere"):
        assert part in problems
    with pytest.raises(UserError) as raised:
        read_config(SubjectEvalOptions, None, [], {"num": 0, "seed": -1, "device": "abacus", "steps": 0, "batch_size": 0})
    for part in ("num", "seed", "device", "steps", "batch_size"):
        assert part in str(raised.value)
    assert not (run / "eval").exists()


def test_what_is_no_run_or_another_kind_of_run_is_refused(run, options, tmp_path):
    assert "not a run folder" in refused(tmp_path, options())[0]
    with pytest.raises(UserError, match="is a dreambooth run: these options are for another task"):
        evaluate(Run.open(run), ControlEvalOptions())


def test_checkpoints_that_are_not_there_or_damaged(run, options):
    assert "there are: step-000001" in refused(run, options(checkpoint="step-7"))[0]
    assert "must be last, best or step-N" in refused(run, options(checkpoint="newest"))[0]
    assert "no best/" in refused(run, options(checkpoint="best"))[0]
    weights = run / "checkpoints/step-000001/parameters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert "not what was written" in refused(run, options(checkpoint="step-1"))[0]


def test_networks_are_looked_for_before_anything_is_drawn(run, options):
    assert "neither a local folder" in refused(run, options(backbone=("dino=./nothing",)))[0]
    assert not (run / "eval").exists()


def test_fid_without_as_many_real_images_is_refused_at_once(run, options):
    assert "5 real and 4 generated" in refused(run, options(metrics=("fid",)))[0]


def test_a_base_with_other_weights_is_refused(run, options):
    text = (run / "run.yaml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("unet: "))
    (run / "run.yaml").write_text(text.replace(line, line[:-4] + "0000"))
    assert "trained on other weights than tiny holds now: unet" in refused(run, options())[0]


def test_other_images_than_it_was_trained_on_are_refused(run, options):
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("  task: dreambooth", "  task: dreambooth\n  images: abc"))
    assert "put them back" in refused(run, options())[0]
