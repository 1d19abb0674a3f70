"""etherdiff data check: everything that can be wrong with a dataset, put there by hand, is found and counted."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from etherdiff import cli
from etherdiff.control import inspection
from etherdiff.control.datasets import check_dataset, find_dataset, render
from etherdiff.images.reading import read_image
from etherdiff.system.errors import UserError
from etherdiff.tiny.world import CLASSES, render_scene


def scenes(folder, train=6, validation=2, **fields):
    """Scenes of the tiny world in the imagefolder style, each with the fields given as functions of (split, index)."""
    for split, count in (("train", train), ("validation", validation)):
        (folder / split).mkdir(parents=True)
        lines = []
        for index in range(count):
            scene = render_scene(split, index)
            Image.fromarray(scene.image).save(folder / split / f"{index}.png")
            Image.fromarray(scene.segmentation).save(folder / split / f"{index}-map.png")
            entry = {"image": f"{index}.png", "control": f"{index}-map.png", "text": scene.short_caption}
            lines.append(json.dumps(entry | {key: make(split, index) for key, make in fields.items()}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def check(folder, **options):
    return check_dataset(str(folder), None, **{"palette": "tiny"} | options)


def test_a_good_dataset_and_its_classes(tmp_path):
    report = check(scenes(tmp_path))
    assert report.problems == {}
    shown = np.unique([render_scene("train", index).segmentation for index in range(6)])
    missing = [name for index, name in enumerate(CLASSES) if index not in shown]
    assert report.notes == {"classes that occur in no map to train on": missing}
    assert report.pairs == {"training": 6, "evaluation": 2}
    maps = [render_scene("train", i).segmentation for i in range(6)] + [
        render_scene("validation", i).segmentation for i in (0, 1)
    ]
    counts = np.bincount(np.ravel(maps), minlength=len(CLASSES)) / np.size(maps)
    assert report.classes == pytest.approx(dict(zip(CLASSES, counts, strict=True)))
    assert render(report).row_count == 2 + 1 + len(CLASSES)


def test_pixels_of_no_class_are_shown_where_there_are_any(tmp_path):
    folder = scenes(tmp_path)
    labels = np.where(render_scene("train", 0).segmentation < 9, 0, 7).astype(np.uint8)
    for path in folder.rglob("*-map.png"):
        Image.fromarray(labels).save(path)
    report = check(folder, palette="ade20k")
    assert report.problems == {}
    assert report.classes["none"] == pytest.approx((labels == 0).mean())
    assert report.classes["road"] == pytest.approx((labels == 7).mean())


def test_everything_wrong_is_found_and_counted(tmp_path):
    folder = scenes(tmp_path, text=lambda split, index: ["a " * 80, "", "fine", "fine", "fine", " "][index])
    train = folder / "train"
    (train / "1.png").write_bytes(b"no image")
    whole = (train / "2.png").read_bytes()
    (train / "2.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(train / "3-map.png")
    Image.new("L", (64, 63)).save(train / "4-map.png")
    (folder / "validation/1.png").write_bytes((folder / "validation/0.png").read_bytes())
    (train / "5.png").write_bytes((folder / "validation/0.png").read_bytes())
    report = check(folder)
    assert report.problems == {
        "images that cannot be read": ["training/1: not an image (text?)", "training/2: truncated"],
        "controls that are not good": ["training/3: label values outside tiny, which has 0 to 20: 99 (4096 pixels)"],
        "controls of another size than their image": ["training/4: 64 x 63, image 64 x 64"],
        "the same image in training and evaluation": [
            "training/5 and evaluation/0",
            "training/5 and evaluation/1",
        ],
        "images without a caption (--make-captions has BLIP describe them)": ["training/1", "training/5", "evaluation/1"],
    }
    assert report.notes.pop("classes that occur in no map to train on")
    ((note, where),) = report.notes.items()
    assert "longer than 77 tokens" in note
    assert where == ["training/0: 82", "evaluation/0: 82"]
    assert (
        f"{folder}: images that cannot be read: 2 (training/1: not an image (text?), training/2: truncated)"
        in report.sentences()
    )


def test_the_same_image_twice_in_one_split(tmp_path):
    folder = scenes(tmp_path)
    (folder / "train/3.png").write_bytes((folder / "train/0.png").read_bytes())
    assert check(folder).problems == {"the same image twice": ["training/0 and training/3"]}


def test_turned_photos_have_the_size_a_viewer_shows(tmp_path):
    folder = scenes(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 40)).save(folder / "train/0.png", exif=exif)
    Image.new("L", (40, 64)).save(folder / "train/0-map.png")
    assert check(folder).problems == {}


def test_missing_files_and_maps_are_found_as_when_training(tmp_path):
    folder = scenes(tmp_path)
    (folder / "train/0.png").unlink()
    (folder / "train/1-map.png").unlink()
    problems = check(folder).problems
    assert problems == {"files named in train/metadata.jsonl that are not there": ["train/0.png", "train/1-map.png"]}
    with pytest.raises(UserError, match=r"not there: 2"):
        find_dataset(str(folder), None, palette="tiny")


def test_a_dataset_of_nothing(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("")
    assert list(check(tmp_path).problems) == ["splits without a pair"]
    with pytest.raises(UserError, match=r"there is no metadata\.jsonl"):
        check(tmp_path / "..")


def test_edges_that_will_be_made_are_not_missing(tmp_path):
    folder = scenes(tmp_path)
    for path in folder.rglob("metadata.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({key: line[key] for key in ("image", "text")}) for line in lines))
    report = check(folder, signal="canny", palette=None)
    assert (report.signal, report.problems, report.classes) == ("canny", {}, None)
    assert list(check(folder).problems) == ["images without a control (segmentation)"]


def test_landmarks_of_another_number_and_outside(tmp_path):
    folder = scenes(tmp_path, control=lambda split, index: f"{index}.json")
    for split, index, points in [("train", i, [[0.5, 0.5]] * (3 if i == 4 else 2)) for i in range(6)] + [
        ("validation", 0, [[0.5, 0.5], [900, 900]]),
        ("validation", 1, [[700, 500], [900, 900]]),
    ]:
        (folder / split / f"{index}.json").write_text(json.dumps(points))
    assert check(folder, signal="landmarks", palette=None).problems == {
        "controls that are not good": ["evaluation/1: none of its 2 points is inside the image"],
        "landmarks of another number than most": ["training/4: 3, most have 2"],
    }


def test_the_command_says_good_or_what_is_wrong(tmp_path, monkeypatch, capsys):
    folder = scenes(tmp_path / "data")
    arguments = ["data", "check", str(folder), "--palette", "tiny"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0
    assert "pairs, training" in done.output
    (folder / "train/1.png").write_bytes(b"")
    monkeypatch.setattr("sys.argv", ["etherdiff", *arguments, "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["good"], report["pairs"]) == (False, {"training": 6, "evaluation": 2})
    assert report["problems"] == {"images that cannot be read": {"count": 1, "cases": ["training/1: zero bytes"]}}
    assert f"error: {folder}: images that cannot be read: 1 (training/1: zero bytes)\n" in err


def test_the_command_looks_in_the_data_root(tmp_path, monkeypatch):
    scenes(tmp_path / "mine")
    (tmp_path / "mine/palette.json").write_text(json.dumps([[index, 0, 0] for index in range(len(CLASSES))]))
    monkeypatch.setenv("ETHERDIFF_DATA", str(tmp_path))
    done = CliRunner().invoke(cli.app, ["data", "check", "mine", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.output[done.output.index("{") :])["good"]


# --- The same check before training -----------------------------------------------------------------------------------


def test_what_data_check_finds_is_found_before_training(tmp_path, capsys):
    folder = scenes(tmp_path)
    train = folder / "train"
    (train / "1.png").write_bytes(b"no image")
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(train / "3-map.png")
    Image.new("L", (64, 63)).save(train / "4-map.png")
    (train / "5.png").write_bytes((train / "0.png").read_bytes())
    report = check(folder)
    with pytest.raises(UserError) as refused:
        find_dataset(str(folder), None, palette="tiny", read_files=True)
    warned = " ".join(capsys.readouterr().err.split())
    doubt = "the same image twice"
    assert refused.value.problems == [line for line in report.sentences() if doubt not in line]
    assert len(refused.value.problems) == 3
    assert f"warning: {folder}: {doubt}: 1 (training/0 and training/5)" in warned
    assert f"warning: {folder}: classes that occur in no map to train on: " in warned


@pytest.mark.parametrize("dry", [True, False])
def test_train_s2i_refuses_bad_pairs_before_its_first_step_and_in_the_dry_run(dry, tmp_path):
    folder = scenes(tmp_path / "data")
    (folder / "train/1.png").write_bytes(b"xx")
    Image.fromarray(np.full((64, 64), 200, np.uint8)).save(folder / "train/5-map.png")
    Image.new("RGB", (128, 64)).save(folder / "validation/1.png")
    arguments = ["train-s2i", "--base", "tiny", "--dataset", str(folder), "--palette", "tiny", "--steps", "20"]
    arguments += ["--output", str(tmp_path / "run"), "--tracker", "none", *(["--dry-run"] if dry else [])]
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, UserError)
    assert done.exception.problems == [
        f"{folder}: images that cannot be read: 1 (training/1: not an image (text?))",
        f"{folder}: controls that are not good: 1 (training/5: label values outside tiny, which has 0 to 20: "
        "200 (4096 pixels))",
        f"{folder}: controls of another size than their image: 1 (evaluation/1: 64 x 64, image 128 x 64)",
    ]
    assert not (tmp_path / "run").exists()


def test_good_files_are_read_once_and_changed_ones_again(tmp_path, monkeypatch):
    folder = scenes(tmp_path)
    first = check(folder)
    read = []
    monkeypatch.setattr(inspection, "read_image", lambda path: read.append(path.name) or read_image(path))
    inspection._inspect.cache_clear()  # as another process does
    (folder / "train/2-map.png").write_bytes((folder / "train/3-map.png").read_bytes())
    (folder / "train/4.png").write_bytes(b"")
    again = check(folder)
    assert sorted(read) == ["2.png", "4.png"]
    assert again.problems == {"images that cannot be read": ["training/4: zero bytes"]}
    assert (again.pairs, again.classes.keys()) == (first.pairs, first.classes.keys())
    for cached in (inspection.cache_dir() / "checked-1").iterdir():
        cached.write_bytes(b"\xff\xfe\x00 damaged")
    inspection._inspect.cache_clear()
    assert check(folder).problems == again.problems
