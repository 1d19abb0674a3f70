"""Datasets as they lie on disks, small ones made by hand: what is found, what is derived once, and what is refused."""

import io
import json
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from etherdiff.control import datasets
from etherdiff.control.datasets import check_dataset, find_dataset, list_dataset
from etherdiff.control.readers import Row, tiny_world
from etherdiff.control.readers import imagefolder as imagefolder_module
from etherdiff.control.readers.imagefolder import read_imagefolder, split_by_name, unpack
from etherdiff.images.reading import resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.tiny.world import render_scene


def picture(path, seed=0, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(path)
    return path


def label_map(path, value=1, size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def imagefolder(folder, count, start=0, **without):
    """`count` pairs in a folder; without={"text": {3}}: number 3 has no text."""
    lines = []
    for index in range(start, start + count):
        entry = {"image": f"images/{index}.png", "control": f"maps/{index}.png", "text": f"thing {index}"}
        picture(folder / entry["image"], index)
        label_map(folder / entry["control"])
        lines.append(json.dumps({key: value for key, value in entry.items() if index not in without.get(key, ())}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def ade20k(root, captions=True):
    lines = []
    for split, stem in [("training", "ADE_train_1"), ("training", "ADE_train_2"), ("validation", "ADE_val_1")]:
        picture(root / "images" / split / f"{stem}.jpg", seed=len(lines))
        label_map(root / "annotations" / split / f"{stem}.png")
        lines.append(
            {"source": f"somewhere/{stem}.png", "target": f"elsewhere\\{stem}.jpg", "prompt": f"the prompt of {stem} "}
        )
    if captions:
        (root / "prompt_train.json").write_text("\n".join(map(json.dumps, lines[:2])))
        (root / "prompt_val.json").write_text(json.dumps(lines[2]) + "\n")
    return root


# imagefolder


def test_a_folder_with_one_metadata_file_keeps_some_for_evaluation(tmp_path):
    imagefolder(tmp_path, 50)
    found = find_dataset(str(tmp_path), None, palette="ade20k")
    assert (len(found.training), len(found.evaluation)) == (48, 2)
    assert not {pair.name for pair in found.training} & {pair.name for pair in found.evaluation}
    pair = found.training[0]
    number = pair.name.removeprefix("images-")
    assert (pair.image, pair.control) == (tmp_path / f"images/{number}.png", tmp_path / f"maps/{number}.png")
    assert pair.text == f"thing {number}"
    assert found.signal.target(pair.control, 8).tolist() == [[0] * 8] * 8


def test_which_pairs_are_kept_depends_on_names_only():
    rows = [Row(f"name{index}", None, None, None) for index in range(200)]
    _, kept = split_by_name(rows)
    _, again = split_by_name(rows[::-1])
    assert len(kept) == 10
    assert {row.name for row in kept} == {row.name for row in again}
    assert [len(part) for part in split_by_name(rows[:1])] == [1, 0]
    assert [len(part) for part in split_by_name(rows[:2])] == [1, 1]
    many = [Row(str(index), None, None, None) for index in range(20_000)]
    assert [len(part) for part in split_by_name(many)] == [19_500, 500]


@pytest.mark.parametrize(("training", "evaluation"), [("train", "validation"), ("training", "val"), ("train", "test")])
def test_a_folder_with_splits(training, evaluation, tmp_path):
    imagefolder(tmp_path / training, 3)
    imagefolder(tmp_path / evaluation, 2, start=10)
    found = find_dataset(str(tmp_path), None)
    assert [pair.text for pair in found.training] == ["thing 0", "thing 1", "thing 2"]
    assert [pair.text for pair in found.evaluation] == ["thing 10", "thing 11"]


def test_a_folder_in_the_data_root_goes_by_its_name(tmp_path):
    imagefolder(tmp_path / "mine" / "train", 2)
    found = find_dataset("mine", tmp_path)
    assert (found.name, len(found.training), found.evaluation) == ("mine", 2, ())


def test_a_folders_own_palette_is_taken_unless_another_is_named(tmp_path):
    imagefolder(tmp_path, 3)
    (tmp_path / "palette.json").write_text('{"a": [1, 2, 3], "b": [4, 5, 6]}')
    found = find_dataset(str(tmp_path), None)
    assert found.signal.palette.classes == ("a", "b")
    assert found.signal.target(found.training[0].control, 1).tolist() == [[1]]
    assert find_dataset(str(tmp_path), None, palette="tiny").signal.palette.name == "tiny"


def test_everything_wrong_with_the_files_is_said_at_once(tmp_path):
    folder = imagefolder(tmp_path / "data", 6, control={1}, text={2, 3})
    (folder / "images/4.png").unlink()
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('not json\n{"text": "no image"}\n\n')
        file.write('{"image": "images/0.png", "control": "maps/0.png", "text": "again"}\n')
        file.write('{"image": "../outside.png", "control": "/etc/hostname", "text": "out"}\n')
    with pytest.raises(UserError) as refused:
        find_dataset(str(folder), None)
    said = [problem.removeprefix(f"{folder}: ") for problem in refused.value.problems]
    assert said == [
        "files named in metadata.jsonl that are not there: 1 (images/4.png)",
        "lines of metadata.jsonl that are not JSON objects with an image: 2 (line 7, line 8)",
        "images named twice in metadata.jsonl: 1 (images/0.png)",
        f"paths that lead out of {folder}: 2 ({folder}/../outside.png, /etc/hostname)",
        *[problem for problem in said if problem.startswith("images without a control")],
        *[problem for problem in said if problem.startswith("images without a caption")],
    ]
    assert len(said) == 6
    assert any(problem.startswith("images without a control (segmentation): 1 (") for problem in said)
    assert any(problem.startswith("images without a caption: 2 (") and "--make-captions" in problem for problem in said)


def test_images_of_one_stem_in_several_folders_keep_their_captions(tmp_path):
    lines, captions = [], []
    for number, name in enumerate(["a/1.png", "b/1.png", "a-1.png", "b/1.jpg"]):
        picture(tmp_path / name, number)
        label_map(tmp_path / "maps" / f"{number}.png")
        lines.append(json.dumps({"image": name, "control": f"maps/{number}.png"}))
        captions.append(json.dumps({"image": f"elsewhere/{name}", "text": f"text of {name}"}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "captions.jsonl").write_text("\n".join(captions))
    found = find_dataset(str(tmp_path), None, captions=tmp_path / "captions.jsonl")
    pairs = sorted((*found.training, *found.evaluation), key=lambda pair: pair.control)
    assert [pair.text for pair in pairs] == ["text of a/1.png", "text of b/1.png", "text of a-1.png", "text of b/1.jpg"]
    assert [pair.name for pair in pairs] == ["a-1", "b-1", "a-1-2", "b-1-2"]  # names become those of files
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "1.png", "text": "whose?"}))
    with pytest.raises(UserError, match=r"line 1: 1\.png may be .*a/1\.png, .*b/1\.png"):
        find_dataset(str(tmp_path), None, captions=tmp_path / "captions.jsonl")


def test_files_that_only_their_suffixes_tell_apart_are_refused_where_stems_name_them(tmp_path):
    root = ade20k(tmp_path / "ade20k")
    picture(root / "images/training/ADE_train_1.png")
    label_map(root / "annotations/validation/ADE_val_1.bmp")
    with pytest.raises(UserError) as refused:
        find_dataset("ade20k", tmp_path)
    assert refused.value.problems == [
        "ade20k: images that only their suffixes tell apart: 1 (images/training/ADE_train_1.jpg and ADE_train_1.png)",
        "ade20k: label maps that only their suffixes tell apart: 1 (annotations/validation/ADE_val_1.bmp and ADE_val_1.png)",
    ]
    picture(coco(tmp_path / "coco") / "val2017/000000000001.png")
    with pytest.raises(UserError, match="coco-canny: images that only their suffixes tell apart: 1"):
        find_dataset("coco-canny", tmp_path)


def test_a_folder_without_metadata_says_what_it_wants(tmp_path):
    with pytest.raises(UserError, match=r"there is no metadata.jsonl in it, nor in train/"):
        find_dataset(str(tmp_path), None)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        find_dataset(str(tmp_path), None)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no pair to train on"):
        find_dataset(str(tmp_path), None)


@pytest.mark.parametrize(
    ("name", "hint"), [("ade20", "Did you mean ade20k"), ("", "neither a folder"), ("x/y", "neither a folder")]
)
def test_an_unknown_dataset(name, hint, tmp_path):
    with pytest.raises(UserError, match=hint):
        find_dataset(name, tmp_path)


def test_what_is_wrong_with_the_options(tmp_path):
    imagefolder(tmp_path, 2)
    with pytest.raises(UserError, match=r"must be segmentation, canny, .* or pidi, not 'sketch'"):
        find_dataset(str(tmp_path), None, signal="sketch")
    with pytest.raises(UserError, match="is not there"):
        find_dataset(str(tmp_path), None, captions=tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="only segmentation has one"):
        find_dataset(str(tmp_path), None, signal="canny", palette="tiny")


# ADE20K


@pytest.mark.parametrize("where", ["ade20k", "ade20k/ADEChallengeData2016", "ADEChallengeData2016"])
def test_ade20k_as_mit_hands_it_out(where, tmp_path):
    ade20k(tmp_path / where)
    found = find_dataset("ade20k", tmp_path)
    assert [pair.name for pair in found.training] == ["ADE_train_1", "ADE_train_2"]
    assert [pair.text for pair in found.evaluation] == ["the prompt of ADE_val_1"]
    assert found.signal.target(found.training[0].control, 2).tolist() == [[0, 0], [0, 0]]


def test_ade20k_captions_from_a_file_that_is_named(tmp_path):
    ade20k(tmp_path / "ade20k")
    texts = [
        {"image": f"{stem}.jpg", "control": "x", "text": stem[::-1]} for stem in ("ADE_train_1", "ADE_train_2", "ADE_val_1")
    ]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, texts)))
    found = find_dataset("ade20k", tmp_path, captions=tmp_path / "mine.jsonl")
    assert [pair.text for pair in found.training] == ["1_niart_EDA", "2_niart_EDA"]


def test_ade20k_with_files_missing(tmp_path):
    root = ade20k(tmp_path / "ade20k")
    (root / "annotations/training/ADE_train_1.png").unlink()
    (root / "images/validation/ADE_val_1.jpg").unlink()
    with pytest.raises(UserError) as refused:
        find_dataset("ade20k", tmp_path)
    assert refused.value.problems == [
        "ade20k: images without a label map: 1 (training/ADE_train_1.jpg)",
        "ade20k: label maps without an image: 1 (validation/ADE_val_1.png)",
    ]
    shutil.rmtree(root / "annotations" / "validation")
    with pytest.raises(UserError, match=r"annotations/validation is missing"):
        find_dataset("ade20k", tmp_path)


def test_ade20k_without_captions_names_the_way_out(tmp_path):
    ade20k(tmp_path / "ade20k", captions=False)
    with pytest.raises(UserError, match=r"images without a caption: 3 \(ADE_train_1, .*--make-captions"):
        find_dataset("ade20k", tmp_path)


def test_ade20k_that_is_nowhere_says_where_it_was_looked_for(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        UserError, match=r"ade20k is not there, and the hub dataset limingcv/Captioned_ADE20K.*no route to host"
    ):
        find_dataset("ade20k", tmp_path)
    with pytest.raises(UserError, match="no data root is given"):
        find_dataset("ade20k", None)


# the hub's parquet files


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return {"bytes": buffer.getvalue(), "path": "ADE_train_00000001.jpg"}


def write_parquet(path, rows):
    import pyarrow as arrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path)


def hub_row(seed, text):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 24, 3)).astype(np.uint8))
    label = Image.new("RGB", (24, 16), (6, 230, 230))  # the sky
    return {"image": encoded(image, "JPEG"), "seg_map": encoded(label), "control_seg": encoded(label), "prompt": text}


def test_a_hub_dataset_is_unpacked_once(monkeypatch, tmp_path):
    snapshot = tmp_path / "snapshot"
    write_parquet(snapshot / "data/train-00000-of-00002.parquet", [hub_row(0, "zero"), hub_row(1, "one")])
    write_parquet(snapshot / "data/train-00001-of-00002.parquet", [hub_row(2, "two")])
    write_parquet(snapshot / "data/validation-00000-of-00001.parquet", [hub_row(3, "three")])
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *given, **options: asked.append(given) or str(snapshot))
    found = find_dataset("ade20k", None)
    assert asked == [("limingcv/Captioned_ADE20K",)]
    assert [pair.text for pair in found.training + found.evaluation] == ["zero", "one", "two", "three"]
    assert len(found.evaluation) == 1
    assert found.training[2].image.read_bytes() == hub_row(2, "")["image"]["bytes"]
    assert (found.signal.target(found.training[0].control, 4) == 2).all()
    monkeypatch.setattr(imagefolder_module, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert find_dataset("ade20k", None) == found


def test_a_hub_dataset_in_other_spellings(tmp_path):
    row = hub_row(0, "")
    other = {"image": row["image"], "conditioning_image": row["seg_map"], "captions": ["first", "second"]}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", [other])
    unpack([tmp_path / "train-00000-of-00001.parquet"], tmp_path / "out")
    assert read_imagefolder(tmp_path / "out").training[0].text == "first"


def test_a_hub_dataset_with_unknown_columns(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", [{"picture": b"x", "prompt": "y"}])
    with pytest.raises(UserError, match=r"train-0.parquet has the columns picture, prompt; one of image"):
        unpack([tmp_path / "train-0.parquet"], tmp_path / "out")
    write_parquet(tmp_path / "other-0.parquet", [hub_row(0, "")])
    with pytest.raises(UserError, match="named after the split train"):
        unpack([tmp_path / "other-0.parquet"], tmp_path / "out")


# the tiny world


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(tiny_world.read_tiny_world, "__defaults__", (6, 4))


@pytest.mark.parametrize(("name", "split"), [("tiny", "test"), ("tiny-validation", "validation")])
def test_the_tiny_world(name, split, few_scenes):
    found = find_dataset(name, None)
    assert (len(found.training), len(found.evaluation)) == (6, 4)
    for index, pair in enumerate(found.training):
        scene = render_scene("train", index)
        assert (np.asarray(Image.open(pair.image)) == scene.image).all()
        assert (found.signal.target(pair.control, 64) == scene.segmentation).all()
        assert pair.text == scene.short_caption
    assert [pair.text for pair in found.evaluation] == [render_scene(split, index).short_caption for index in range(4)]
    assert {(tiny_world.TRAINING, tiny_world.EVALUATED)} == {(6000, 400)}


def test_the_tiny_world_is_rendered_once(few_scenes, monkeypatch):
    find_dataset("tiny", None)
    monkeypatch.setattr(tiny_world, "render_scene", lambda *_: pytest.fail("rendered again"))
    find_dataset("tiny", None)


def test_a_broken_rendering_leaves_nothing(monkeypatch):
    def fails(split, index):
        if index == 2:
            raise KeyboardInterrupt
        return render_scene(split, index)

    monkeypatch.setattr(tiny_world, "render_scene", fails)
    with pytest.raises(KeyboardInterrupt):
        tiny_world.scenes_folder("train", 3)
    folder = tiny_world.cache_dir() / "tiny-scenes-1"
    assert not (folder / "train-3").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith("tmp")]


# Canny and landmarks


def coco(root):
    for split in ("train2017", "val2017"):
        images = []
        for index in range(2):
            picture(root / split / f"{index:012d}.jpg", seed=index + 10 * (split == "val2017"))
            images.append({"id": index, "file_name": f"{index:012d}.jpg"})
        notes = [
            {"id": 10 * take + i, "image_id": i, "caption": f" {split} {i} take {take}\n"} for take in (2, 1) for i in (0, 1)
        ]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return root


def test_coco_has_its_first_captions_and_edges_made_once(tmp_path, monkeypatch):
    coco(tmp_path / "coco")
    found = find_dataset("coco-canny", tmp_path, resolution=32)
    assert [pair.text for pair in found.training] == ["train2017 0 take 1", "train2017 1 take 1"]
    assert [pair.text for pair in found.evaluation] == ["val2017 0 take 1", "val2017 1 take 1"]
    for pair in found.training + found.evaluation:
        square = np.asarray(resize_and_crop(Image.open(pair.image), 32))
        assert (found.signal.target(pair.control, 32) == (cv2.Canny(square, 100, 200) > 0)).all()
    monkeypatch.setattr(type(found.signal), "derive", lambda *_: pytest.fail("made again"))
    assert find_dataset("coco-canny", tmp_path, resolution=32) == found


def test_edges_of_another_resolution_are_others(tmp_path):
    coco(tmp_path / "coco")
    one, other = (find_dataset("coco-canny", tmp_path, resolution=size) for size in (32, 48))
    assert one.training[0].control != other.training[0].control
    assert Image.open(other.training[0].control).size == (48, 48)


def test_coco_with_parts_missing(tmp_path):
    with pytest.raises(UserError, match="point --data-root"):
        find_dataset("coco-canny", None)
    with pytest.raises(UserError, match="coco is not there"):
        find_dataset("coco-canny", tmp_path)
    root = coco(tmp_path / "coco")
    (root / "annotations/captions_val2017.json").write_text('{"images": 3}')
    with pytest.raises(UserError, match="cannot be read as COCO's captions"):
        find_dataset("coco-canny", tmp_path)
    shutil.rmtree(root / "annotations")
    with pytest.raises(UserError, match=r"captions_train2017.json is missing"):
        find_dataset("coco-canny", tmp_path)


def test_a_dataset_of_maps_gives_edges_as_well(few_scenes):
    found = find_dataset("tiny", None, signal="canny", resolution=64)
    assert found.signal.name == "canny"
    assert all("controls-1" in str(pair.control) for pair in found.training)
    with pytest.raises(UserError, match=r"images without a control \(landmarks\): 10"):
        find_dataset("tiny", None, signal="landmarks")


def test_images_are_given_the_controls_that_an_annotator_draws(tmp_path, monkeypatch):
    asked = []

    def draw(name, image):
        asked.append((name, image.shape))
        return 255 - image

    monkeypatch.setattr("etherdiff.control.signals.annotation.annotate", draw)
    imagefolder(tmp_path, 2, control={0, 1})
    found = find_dataset(str(tmp_path), None, signal="depth", resolution=16)
    assert found.signal.name == "depth"
    assert asked == [("depth", (16, 16, 3))] * 2
    for pair in (*found.training, *found.evaluation):
        square = np.asarray(resize_and_crop(Image.open(pair.image), 16))
        assert (found.signal.picture(pair.control, 16) == 255 - square).all()


def test_edges_of_images_that_cannot_be_read_are_all_named(tmp_path):
    imagefolder(tmp_path, 4, control={0, 1, 2, 3})
    (tmp_path / "images/1.png").write_bytes(b"")
    (tmp_path / "images/2.png").write_bytes(b"text")
    with pytest.raises(UserError) as refused:
        find_dataset(str(tmp_path), None, signal="canny")
    assert len(refused.value.problems) == 2
    assert any("zero bytes" in problem for problem in refused.value.problems)


def test_celebahq_landmarks_are_told_their_images_size(tmp_path):
    folder = tmp_path / "celebahq-landmarks"
    (folder / "train").mkdir(parents=True)
    picture(folder / "train/a.png", 1, size=(40, 20))
    (folder / "train/a.json").write_text("[[20, 10], [10, 10]]")
    (folder / "train/metadata.jsonl").write_text('{"file_name": "a.png", "control": "a.json", "text": "a face"}\n')
    found = find_dataset("celebahq-landmarks", tmp_path)
    assert found.signal.name == "landmarks"
    assert found.signal.target(found.training[0].control, 20).tolist() == [[10, 10], [0, 10]]


def test_listing_computes_nothing(tmp_path, monkeypatch):
    imagefolder(tmp_path, 3, control={0, 1, 2}, text={1})
    monkeypatch.setattr(datasets, "in_threads", lambda *_: pytest.fail("computed"))
    signal, listing = list_dataset(str(tmp_path), None, "canny")
    assert signal.name == "canny"
    assert [row.control for _, row in listing.rows()] == [None] * 3
    assert sorted(row.text or "" for _, row in listing.rows()) == ["", "thing 0", "thing 2"]
    assert listing.problems == {}


def test_captions_are_made_only_for_those_that_lack_one(tmp_path, monkeypatch):
    imagefolder(tmp_path / "train", 3, text={1})
    asked = []

    def describe(images, device):
        asked.extend([path.name for path in images] + [device])
        return ["made"]

    monkeypatch.setattr(datasets, "blip_captions", describe)
    found = find_dataset(str(tmp_path), None, make_captions=True, device="cpu")
    assert asked == ["1.png", "cpu"]
    assert [pair.text for pair in found.training] == ["thing 0", "made", "thing 2"]


# --- What is left out -------------------------------------------------------------------------------------------------


def test_images_that_no_line_names_are_said(tmp_path, capsys):
    folder = imagefolder(tmp_path / "mine", 3)
    find_dataset(str(folder), None, palette="tiny")
    assert "left out" not in capsys.readouterr().err
    for name in ("images/more.png", "images/deep/1.png", "images/deep/2.png", "images/._0.png", ".cache/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(folder / name)
    find_dataset(str(folder), None, palette="tiny")
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out of {folder}: images: 1 image not named in metadata, images/deep: 2 images not named in metadata" in said


def test_what_a_named_dataset_holds_besides_is_said_and_checked(tmp_path, capsys):
    root = ade20k(tmp_path / "ade20k")
    picture(root / "images/training/a/abbey/1.png")
    (root / "images/validation/x.jxl").touch()
    (root / "annotations/validation/.DS_Store").touch()
    find_dataset("ade20k", tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "left out of ade20k: images/training: 1 folder with 1 image, images/validation: 1 .jxl file" in said
    notes = check_dataset("ade20k", tmp_path).notes
    assert len(notes.pop("classes that occur in no map to train on")) == 149
    assert notes == {
        "folders of which something is left out": ["images/training: 1 folder with 1 image", "images/validation: 1 .jxl file"]
    }
    Image.new("L", (24, 16), 9).save(root / "images/training/ADE_train_1.jpg")
    notes = check_dataset("ade20k", tmp_path).notes
    assert notes["images that are nearly black as read here"] == ["training/ADE_train_1"]
    root = coco(tmp_path / "coco")
    picture(root / "train2017/sub/1.png")
    find_dataset("coco-canny", tmp_path)
    assert "left out of coco-canny: train2017: 1 folder with 1 image" in " ".join(capsys.readouterr().err.split())
