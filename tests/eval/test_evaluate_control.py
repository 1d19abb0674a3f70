"""`etherdiff eval` of controllable runs: what is drawn, held against which map, taken up again or refused."""

import html
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from eval_toys import VIT_PREPROCESSOR, save
from PIL import Image
from rich.console import Console
from tiny_world.upernet import make_model
from transformers import ResNetConfig, ResNetForImageClassification, SegformerImageProcessor

from etherdiff import cli
from etherdiff.config import ControlEvalOptions, DreamBoothConfig, S2IConfig, read_config
from etherdiff.control.datasets import ControlDataset, Pair
from etherdiff.control.signals.canny import Canny
from etherdiff.control.signals.landmarks import Landmarks, NoFaceError
from etherdiff.control.signals.segmentation import Palette, Segmentation
from etherdiff.eval import control_scores, judges
from etherdiff.eval.compare import as_markdown, cell, compare
from etherdiff.eval.control_scores import ReadBack, ReadLandmarks, find_readback
from etherdiff.eval.evaluate import evaluate, plan_evaluation, render
from etherdiff.images.reading import read_image
from etherdiff.images.writing import read_png_settings
from etherdiff.report import show_report
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.tasks import control_sets
from etherdiff.tiny.world import CLASSES, PALETTE

SIDE = 16
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40))
SIGNAL = Segmentation(Palette("four", ("red", "green", "blue", "yellow"), COLOURS))
MAPS = 20

pytestmark = pytest.mark.filterwarnings("ignore")


def make_pairs(folder, count=MAPS, classes=4):
    """Maps of random stripes; the real image is the map's colours, a little off."""
    pairs = []
    folder.mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        labels = np.repeat(rng.integers(0, classes, SIDE, dtype=np.uint8)[:, None], SIDE, axis=1)
        colours = PALETTE if classes > 4 else np.array(COLOURS)
        image = np.clip(colours[labels].astype(int) + rng.integers(-9, 10, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        paths = folder / f"{number}.png", folder / f"{number}-map.png"
        for path, pixels in zip(paths, (image, labels), strict=True):
            Image.fromarray(pixels).save(path)
        pairs.append(Pair(f"scene {number}", *paths, f"a scene with number {number}"))
    return tuple(pairs)


class FollowsControl:
    """Stands for the pipeline: draws the control's colours, with noise that only an image's own generator decides."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt, *, control_image, control_scale, height, width, generator, num_images_per_prompt, **how):
        assert num_images_per_prompt == 1
        self.calls.append((list(prompt), control_scale, how))
        images = []
        for control, one in zip(control_image, generator, strict=True):
            noise = torch.randint(-20, 21, (height, width, 3), generator=one).numpy()
            pixels = np.asarray(control).astype(int) * control_scale + 100 * (1 - control_scale)
            images.append(np.clip(pixels + noise, 0, 255).astype(np.uint8) / 255)
        return SimpleNamespace(images=np.stack(images))


class NearestColour(ReadBack):
    """A segmenter without a network, so that scores can be foreseen."""

    role, unread, size = "segmenter", "bad_features", len(COLOURS)

    def identity(self):
        return {"name": "nearest colour"}

    def read(self, images, resolution):
        distances = [np.square(np.asarray(i)[:, :, None].astype(int) - np.array(COLOURS)).sum(-1) for i in images]
        return [torch.from_numpy(distance.argmin(-1)) for distance in distances]


@pytest.fixture(scope="session")
def features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks") / "features"
    torch.manual_seed(0)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    save(ResNetForImageClassification(resnet), folder, VIT_PREPROCESSOR)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path):
    """A run folder as training leaves it, as far as it is looked at."""
    folder = RunFolder(tmp_path / "run")
    folder.control_encoder.mkdir(parents=True)
    folder.adapter.mkdir()
    folder.refitted_adapter.mkdir()
    (folder.control_encoder / "config.json").write_text("{}")
    config = S2IConfig(base="tiny", dataset="somewhere", resolution=SIDE, steps=7, output=folder.path)
    write_settings(folder, "s2i", config, {"base": {"fingerprint": {"unet": "abc"}}})
    return folder.path


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """What the run draws with, over a dataset of `MAPS` pairs that are judged by their colours."""
    drawing, pairs = FollowsControl(), make_pairs(tmp_path / "data")
    use(monkeypatch, drawing, ControlDataset("stripes", SIGNAL, (), pairs))
    monkeypatch.setattr(judges, "find_readback", lambda *_: NearestColour())
    return drawing


def use(monkeypatch, drawing, dataset):
    """Draw and judge with these."""
    monkeypatch.setattr(control_sets, "run_dataset", lambda *_: dataset)
    monkeypatch.setattr(control_sets, "load_control_run", lambda *_: (drawing,))


def evaluated(run, options):
    return evaluate(Run.open(run), options)


def options(**changes):
    return ControlEvalOptions(**({"device": "cpu", "metrics": ("miou", "accuracy"), "batch_size": 3} | changes))


def pngs(run, name="images"):
    folder = run / "eval" / name
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


# --- What it leaves ----------------------------------------------------------------------------------------------------


def test_images_lie_by_pair_and_seed_and_say_how_they_were_made(run, pipeline):
    result = evaluated(run, options(num_maps=4, seed=5))
    assert list(pngs(run)) == [f"00{n}-scene-{n}/{5 + n}.png" for n in range(4)]
    said = read_png_settings(run / "eval/images/001-scene-1/6.png")
    expected = {"prompt": "a scene with number 1", "seed": 6, "sampler": "DDIM", "steps": 50, "guidance_scale": 9.0}
    assert said == said | expected | {"control": "the pair's own", "run_sha256": result["run"]["weights_sha256"]}
    assert [call[0] for call in pipeline.calls] == [[f"a scene with number {n}" for n in part] for part in (range(3), [3])]
    assert pipeline.calls[0][2] == {
        "num_inference_steps": 50,
        "guidance_scale": 9.0,
        "guide_control": False,
        "output_type": "np",
    }
    sheet = Image.open(run / "eval/sheet.png")
    assert sheet.height > 4 * 128
    assert set(json.loads((run / "eval/cost.json").read_text())["seconds"]) == {"load", "images", "real_images", "score"}


def test_metrics_json_has_scores_with_identities_and_each_class(run, pipeline, features):
    result = evaluated(run, options(metrics=None, backbone=(f"fid={features}",)))
    assert json.loads((run / "eval/metrics.json").read_text()) == result
    assert set(result["scores"]) == {"miou", "accuracy", "mean_accuracy", "fid"}
    for name in ("miou", "accuracy"):
        one = result["scores"][name]
        assert (one["mean"], one["n"]) == (1, MAPS)
        assert one["low"] == one["high"] == 1
    fid = result["scores"]["fid"]
    assert fid["n"] == MAPS
    assert fid["low"] <= fid["mean"] <= fid["high"]
    assert (fid["identity"]["features"], fid["identity"]["reference"]["n"]) == (8, MAPS)
    identities = [one["identity"] for one in result["scores"].values()]
    for part in ("controls", "prompts", "seeds", "generation"):
        assert all(identity[part] == identities[0][part] for identity in identities)
    assert identities[0]["generation"] | {"control": "the pair's own", "steps": 50} == identities[0]["generation"]
    assert [one["name"] for one in result["per_class"]] == ["red", "green", "blue", "yellow"]
    assert all(one["iou"] == 1 for one in result["per_class"])
    assert sum(one["pixels_wanted"] for one in result["per_class"]) == MAPS * SIDE * SIDE
    assert result["run"] == result["run"] | {"task": "s2i", "dataset": "stripes", "signal": "segmentation", "step": 7}
    assert result["paper"]["scores"]["miou"]["value"] == 0.273
    assert result["paper"]["scores"]["miou"]["differs"]


def test_magnitudes_that_were_fitted_again_stand_beside_the_papers_row_of_them(run, pipeline):
    config = S2IConfig(base="tiny", dataset="somewhere", resolution=SIDE, steps=7, method="oft", refit=run)
    write_settings(RunFolder(run), "s2i", config, {})
    result = evaluated(run, options())
    assert result["run"]["method"] == "oft"
    assert result["paper"]["method"] == "oft+magnitude"
    assert {name: one["value"] for name, one in result["paper"]["scores"].items()} == {"miou": 0.246, "accuracy": 0.633}


def test_control_is_real_shuffled_maps_fall_to_chance_and_none_says_nothing(run, pipeline):
    result = evaluated(run, options(shuffle_maps=True, without_control=True, real=True))
    beside = {name: found["scores"]["accuracy"]["mean"] for name, found in result["beside"].items()}
    assert result["scores"]["accuracy"]["mean"] == beside["real_images"] == 1
    assert beside["shuffled_images"] == pytest.approx(0.25, abs=0.12)
    assert beside["uncontrolled_images"] < 0.5
    told = [found["scores"]["miou"]["identity"] for found in (result, *result["beside"].values())]
    controls = [one["generation"] and one["generation"]["control"] for one in told]
    assert controls == ["the pair's own", "that of the pair half the set further on", "switched off", None]
    assert all(one["controls"] == told[0]["controls"] for one in told)  # held against the same maps
    assert {scale for _, scale, _ in pipeline.calls} == {0.0, 1.0}
    shuffled = read_image(run / "eval/shuffled_images/000-scene-0/0.png")
    other = SIGNAL.picture(Path(str(make_pairs(run.parent / "again")[MAPS // 2].control)), SIDE)
    assert np.abs(np.asarray(shuffled).astype(int) - other).max() <= 20
    console = Console(width=150, record=True)
    console.print(render(result))
    text = console.export_text()
    for part in ("miou", "another's control", "no control", "real images", "1.0000", "stripes: ether+ on tiny, step 7"):
        assert part in text


def test_no_image_is_drawn_with_its_own_map_when_they_are_shuffled(run, pipeline):
    plan = plan_evaluation(Run.open(run), options(num_maps=5, shuffle_maps=True))
    own, other = ([picture.control for picture in plan.sets[name].pictures] for name in ("images", "shuffled_images"))
    assert sorted(own) == sorted(other)
    assert not [one for one, two in zip(own, other, strict=True) if one == two]


def test_intervals_are_over_images(run, pipeline, monkeypatch):
    right = FollowsControl.__call__

    def wrong(self, prompt, *, generator, **given):
        images = right(self, prompt, generator=generator, **given).images
        late = [one.initial_seed() >= MAPS // 2 for one in generator]
        return SimpleNamespace(
            images=np.stack([np.rot90(i) if is_late else i for i, is_late in zip(images, late, strict=True)])
        )

    monkeypatch.setattr(FollowsControl, "__call__", wrong)
    one = evaluated(run, options())["scores"]["accuracy"]
    assert one["low"] < one["mean"] < one["high"] < 1
    assert one["interval"]["over"] == "images"


# --- Going on ----------------------------------------------------------------------------------------------------------


def test_a_second_time_draws_nothing_and_finds_the_same(run, pipeline):
    first = evaluated(run, options(num_maps=5))
    drawn = len(pipeline.calls)
    assert evaluated(run, options(num_maps=5)) == first
    assert len(pipeline.calls) == drawn


def test_stopped_and_started_again_it_draws_what_is_missing_and_the_same_bytes(run, pipeline, monkeypatch, tmp_path):
    whole = evaluated(run, options(num_maps=7))
    images = pngs(run)
    for place in list(images)[4:]:
        (run / "eval/images" / place).unlink()
    cut = run / "eval/images" / next(iter(images))
    cut.write_bytes(cut.read_bytes()[:80])
    kept = run / "eval/images" / list(images)[1]
    before = kept.stat().st_mtime_ns
    pipeline.calls.clear()
    again = evaluated(run, options(num_maps=7))
    assert [len(prompts) for prompts, *_ in pipeline.calls] == [3, 3, 1]  # batches are whole, and those of the first time
    assert pngs(run) == images
    assert again == whole
    assert kept.stat().st_mtime_ns == before


def test_other_sets_are_drawn_beside_without_touching_the_first(run, pipeline):
    first = evaluated(run, options(num_maps=5))
    pipeline.calls.clear()
    second = evaluated(run, options(num_maps=5, without_control=True))
    assert {scale for _, scale, _ in pipeline.calls} == {0.0}
    assert second["scores"] == first["scores"]


def test_images_of_other_settings_are_not_taken(run, pipeline):
    evaluated(run, options(num_maps=5))
    for changes, why in [
        ({"steps": 3}, "steps: 50, here 3"),
        ({"guidance_scale": 2.0}, "guidance_scale: 9.0, here 2.0"),
        ({"guide_control": True}, "guide_control"),
        ({"seed": 1}, r"seeds\.first: 0, here 1"),
        ({"num_maps": 6}, r"seeds\.n: 5, here 6"),
    ]:
        with pytest.raises(UserError, match=why):
            evaluated(run, options(**({"num_maps": 5} | changes)))
    (run / "control_encoder/config.json").write_text('{"trained": "further"}')
    with pytest.raises(UserError, match=r"other settings \(run: .*--overwrite"):
        evaluated(run, options(num_maps=5))
    assert evaluated(run, options(num_maps=5, steps=3, overwrite=True))["scores"]["miou"]["mean"] == 1


def test_where_an_image_is_missing_the_batch_size_matters(run, pipeline):
    first = evaluated(run, options(num_maps=5))
    assert evaluated(run, options(num_maps=5, batch_size=1)) == first
    (run / "eval/images/000-scene-0/0.png").unlink()
    with pytest.raises(UserError, match="batch_size: 3, here 1"):
        evaluated(run, options(num_maps=5, batch_size=1))


def test_black_images_are_counted_and_not_averaged_in(run, pipeline, features):
    how = options(metrics=("miou", "fid"), backbone=(f"fid={features}",))
    evaluated(run, how)
    Image.new("RGB", (SIDE, SIDE)).save(run / "eval/images/003-scene-3/3.png")
    result = evaluated(run, how)
    assert result["left_out"]["black"] == [{"kind": "generated", "prompt": "a scene with number 3", "seed": 3}]
    assert (result["scores"]["miou"]["n"], result["scores"]["fid"]["n"]) == (MAPS - 1, MAPS - 1)
    assert result["scores"]["miou"]["mean"] == 1


# --- Networks and other signals --------------------------------------------------------------------------------------


def test_with_a_network_of_the_tiny_world(run, tmp_path, monkeypatch):
    """The untrained one: what it sees is noise, but every part of the way is gone."""
    torch.manual_seed(0)
    make_model().eval().save_pretrained(tmp_path / "upernet")
    processor = SegformerImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(tmp_path / "upernet")
    palette = Palette("tiny", CLASSES, tuple(map(tuple, PALETTE.tolist())), ignored=())
    dataset = ControlDataset("tiny", Segmentation(palette), (), make_pairs(tmp_path / "data", 3, len(CLASSES)))
    use(monkeypatch, FollowsControl(), dataset)
    result = evaluated(run, options(backbone=(f"segmenter={tmp_path / 'upernet'}",), batch_size=2))
    assert 0 <= result["scores"]["miou"]["mean"] < 0.5
    assert result["scores"]["miou"]["identity"]["backbone"]["name"] == "upernet"
    assert [one["name"] for one in result["per_class"]] == list(CLASSES)
    assert sum(one["pixels_found"] for one in result["per_class"]) == 3 * SIDE * SIDE


def test_edges_are_held_against_the_control(run, tmp_path, monkeypatch):
    """OpenCV need not be there: an edge is where the image is white."""
    white = lambda image, low, high: (np.asarray(image) > 127).all(-1)  # noqa: E731
    monkeypatch.setattr(control_scores, "edges", white)
    monkeypatch.setattr(control_scores, "_opencv", lambda: {"opencv": "none"})
    pairs = make_pairs(tmp_path / "data", 4)
    for pair in pairs:
        lines = np.zeros((SIDE, SIDE), np.uint8)
        lines[:: int(pair.name[-1]) + 2] = 255
        Image.fromarray(lines).save(pair.control)
    dataset = ControlDataset("edges", Canny(SIDE), (), pairs)
    use(monkeypatch, FollowsControl(), dataset)
    result = evaluated(run, options(metrics=("edges_f1", "edges_f1_within_1"), shuffle_maps=True))
    assert result["scores"]["edges_f1"]["mean"] == 1
    shuffled = result["beside"]["shuffled_images"]["scores"]
    assert shuffled["edges_f1"]["mean"] < shuffled["edges_f1_within_1"]["mean"] < 1
    assert result["per_class"] == []


@pytest.fixture
def faces(tmp_path, monkeypatch):
    pairs = make_pairs(tmp_path / "data", 4)
    points = np.random.default_rng(0).uniform(0.1, 0.9, (68, 2))
    for number, pair in enumerate(pairs):
        path = pair.control.with_suffix(".json")
        path.write_text(json.dumps({"points": (points + number / 100).tolist(), "size": [SIDE, SIDE]}))
        pairs = tuple(Pair(p.name, p.image, path, p.text) if p is pair else p for p in pairs)
    dataset = ControlDataset("faces", Landmarks(), (), pairs)
    use(monkeypatch, FollowsControl(), dataset)
    monkeypatch.delenv("ETHERDIFF_FACE_LANDMARKER", raising=False)
    return pairs


def test_landmarks_without_a_detector_are_not_scored_and_it_is_said_why(run, faces):
    result = evaluated(run, options(metrics=("landmarks_error",)))
    assert result["scores"] == {}
    assert "--backbone landmarks=FILE.task" in result["not_scored"]["landmarks_error"]
    console = Console(width=150, record=True)
    console.print(render(result))
    assert "no landmarks_error: no detector" in console.export_text()


def test_landmarks_of_a_detector(run, faces, tmp_path, monkeypatch):
    (tmp_path / "face.task").write_bytes(b"model")
    monkeypatch.setattr(control_scores.importlib.util, "find_spec", lambda name: name)
    signal, seen = Landmarks(), []

    def detect(image, task_file):
        seen.append(image.size)
        if len(seen) == 2:
            raise NoFaceError("mediapipe finds no face in it")
        return signal.target(faces[len(seen) - 1].control, SIDE) + np.array((1.0, 0.0))

    monkeypatch.setattr(control_scores, "detect", detect)
    result = evaluated(run, options(metrics=("landmarks_error",), backbone=(f"landmarks={tmp_path / 'face.task'}",)))
    one = result["scores"]["landmarks_error"]
    eyes = [np.linalg.norm(np.subtract(*signal.target(faces[n].control, SIDE)[[36, 45]])) for n in (0, 2, 3)]
    assert (one["mean"], one["n"]) == (pytest.approx(np.mean(1 / np.array(eyes))), 3)
    assert [entry["seed"] for entry in result["left_out"]["no_face"]] == [1]
    monkeypatch.setattr(control_scores, "detect", lambda *_: np.ones((478, 2)))
    other = evaluated(run, options(metrics=("landmarks_error",), backbone=(f"landmarks={tmp_path / 'face.task'}",)))
    assert "68 points, but 478" in other["not_scored"]["landmarks_error"]
    failure = UserError("no face model: cannot work with it")
    monkeypatch.setattr(control_scores, "detect", lambda *_: (_ for _ in ()).throw(failure))
    with pytest.raises(UserError, match="cannot work"):
        ReadLandmarks(tmp_path / "face.task").read([Image.new("RGB", (8, 8))], 8)


def test_a_signal_that_nothing_reads_is_refused():
    with pytest.raises(UserError, match="nothing here reads depth"):
        find_readback(SimpleNamespace(name="depth"), {}, "tiny", "cpu")


# --- Refusals and the command line -----------------------------------------------------------------------------------


def refused(run, options):
    with pytest.raises(UserError) as raised:
        evaluated(run, options)
    return "\n".join(raised.value.problems)


def test_everything_wrong_with_the_options_comes_in_one_message(run, pipeline):
    told = refused(run, ControlEvalOptions(preset="x", backbone=("dino=y",)))
    for part in ("'x'", "ROLE=NAME, with ROLE of segmenter"):
        assert part in told
    assert not (run / "eval").exists()
    wrong = {"num_maps": 0, "steps": 0, "batch_size": 0, "seed": -1, "device": "abacus"}
    with pytest.raises(UserError) as raised:
        read_config(ControlEvalOptions, None, [], wrong)
    for part in ("num_maps", "steps", "batch_size", "seed", "device"):
        assert part in str(raised.value)


def test_what_does_not_fit_the_dataset_is_refused_before_anything_is_drawn(run, pipeline, tmp_path, monkeypatch):
    config = S2IConfig(base="tiny", dataset="somewhere", signal="segmentation", resolution=SIDE, steps=7)
    write_settings(RunFolder(run), "s2i", config, {})
    told = refused(run, options(num_maps=21, metrics=("dino", "io")))
    for part in ("has 20 pairs", "'dino': of segmentation there are miou", "'io'"):
        assert part in told
    assert "none is asked for" in refused(run, options(metrics=()))
    assert "exchanged" in refused(run, options(num_maps=1, shuffle_maps=True))
    Image.fromarray(np.full((SIDE, SIDE), 9, np.uint8)).save(tmp_path / "data/1-map.png")
    assert "outside four" in refused(run, options())
    empty = ControlDataset("nothing", SIGNAL, (), ())
    use(monkeypatch, pipeline, empty)
    assert "no pairs to evaluate with" in refused(run, options())
    assert not pipeline.calls


def test_a_real_image_that_cannot_be_read_is_named(run, pipeline, tmp_path):
    (tmp_path / "data/2.png").write_bytes(b"nothing")
    assert "2.png" in refused(run, options())


def test_what_is_no_controllable_run_is_refused(run, tmp_path):
    assert "not a run folder" in refused(tmp_path, options())
    write_settings(RunFolder(run), "dreambooth", DreamBoothConfig(base="tiny", subject="dog", steps=7), {})
    assert "is a dreambooth run: these options are for another task" in refused(run, options())


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["etherdiff", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_the_command_judges_a_run_by_its_task(run, pipeline, monkeypatch, capsys):
    arguments = (run, "--num-maps", 3, "--metrics", "miou", "--device", "cpu", "--shuffle-maps", "--json", "--steps", 2)
    arguments += ("--checkpoint", "last", "--base")  # the other task's defaults ask for nothing
    assert not command(monkeypatch, *arguments)
    result = json.loads(capsys.readouterr().out)
    assert result["scores"]["miou"]["n"] == 3
    assert set(result["beside"]) == {"shuffled_images"}
    assert pipeline.calls[0][2] == {
        "num_inference_steps": 2,
        "guidance_scale": 9.0,
        "guide_control": False,
        "output_type": "np",
    }
    assert not command(monkeypatch, run, "--num-maps", 3, "--metrics", "miou", "--device", "cpu", "--steps", 2)
    assert "miou" in capsys.readouterr().out


def test_the_report_shows_the_sheet_the_other_sets_and_each_class(run, pipeline):
    evaluated(run, options(num_maps=3, shuffle_maps=True, real=True))
    show_report(run)
    page = html.unescape((run / "report.html").read_text())
    for part in ("Control and image", "with another's control", "Class by class", "yellow", "ether+ on somewhere", "mIoU"):
        assert part in page
    assert page.count("<img") == 1


def test_two_runs_are_compared_if_they_were_judged_alike(run, pipeline, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    for one in (run, other):
        evaluated(one, options(num_maps=3))
    first, second = compare([run, other])
    assert cell(first, "miou") == cell(second, "miou")
    assert "| dataset | stripes | stripes |" in as_markdown([first, second])
    assert "subject" not in as_markdown([first, second])
    evaluated(other, options(num_maps=3, guidance_scale=1.0, overwrite=True))
    with pytest.raises(UserError, match=r"generation\.guidance_scale: 9\.0, here 1\.0"):
        compare([run, other])


def test_options_of_the_other_task_are_refused(run, pipeline, monkeypatch, capsys):
    assert command(monkeypatch, run, "--num", 3, "--no-base", "--checkpoint", "best") == 2
    assert "--num, --checkpoint, --no-base is for runs of train-dreambooth" in capsys.readouterr().err
    write_settings(RunFolder(run), "dreambooth", DreamBoothConfig(base="tiny", subject="dog", steps=7), {})
    assert command(monkeypatch, run, "--num-maps", 3, "--real") == 2
    assert "--num-maps, --real is for runs of train-s2i" in capsys.readouterr().err
