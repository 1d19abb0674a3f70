"""Caption files as others write them, and BLIP on a tiny random model against transformers itself."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from etherdiff.control import captions
from etherdiff.control.captions import Caption, make_captions, match_captions, read_captions
from etherdiff.system.errors import UserError
from etherdiff.system.files import cache_dir

WORDS = ["a", "red", "blue", "cat", "dog", "on", "grass", "sand", "the", "of", "house", "star", "ball", "big", "small"]


@pytest.fixture(scope="session")
def tiny_blip(tmp_path_factory):
    """A folder with a random BLIP of a few thousand weights."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(vocabulary), "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**size, **text, "encoder_hidden_size": 32, "max_position_embeddings": 64},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # so large that the words depend on the picture
        if "norm" not in name.lower():
            parameter.data *= 2000 if "crossattention" in name or "vision" in name else 20
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Five images, the last with the content of the first."""
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for index, path in enumerate(paths):
        Image.new("RGB", (20, 30), ("black", "white", "red", "blue", "black")[index]).save(path)
    return paths


def test_oft_and_etherdiff_lines_are_read(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text(
        '{"source": "annotations/training/ADE_1.png", "target": "images/training/ADE_1.jpg", "prompt": " a room "}\n\n'
        '{"image": "x/two.v2.jpg", "control": "c/other.png", "text": "zwei"}\n'
        '{"source": "only/three.png", "prompt": "three"}\r\n'
        '{"file_name": "c:\\\\windows\\\\four.jpg", "caption": "four"}\n'
    )
    images = [tmp_path / name for name in ("training/ADE_1.jpg", "two.v2.png", "three.jpg", "four.jpg", "five.jpg")]
    assert match_captions(read_captions(path), images) == dict(zip(images, ("a room", "zwei", "three", "four"), strict=False))


def matched(captions, *images):
    """The captions {name in the file: text} of images, by the images' names."""
    given = [Caption(name, text, f"line {number}") for number, (name, text) in enumerate(captions, 1)]
    found = match_captions(given, [Path("/data", image) for image in images])
    return {str(image.relative_to("/data")): text for image, text in found.items()}


def test_of_one_stem_the_folders_and_then_the_suffix_decide():
    captions = [("img/a/1.png", "a 1"), ("img\\b\\1.png", "b 1"), ("./img/b/2.png", "b 2")]
    assert matched(captions, "img/a/1.png", "img/b/1.png", "img/a/2.png", "img/b/2.png") == {
        "img/a/1.png": "a 1",
        "img/b/1.png": "b 1",
        "img/b/2.png": "b 2",
    }
    assert matched([("1.png", "png"), ("1.jpg", "jpg")], "1.jpg", "1.png") == {"1.png": "png", "1.jpg": "jpg"}
    assert matched([("b/1.png", "b"), ("1.png", "of b too")], "x/b/1.jpg") == {"x/b/1.jpg": "b"}
    assert matched([("1.png", "same"), ("1.png", "same")], "1.png") == {"1.png": "same"}


@pytest.mark.parametrize(
    ("captions", "images", "said"),
    [
        ([("1.png", "x")], ["a/1.png", "b/1.png"], r"line 1: 1\.png may be /data/a/1\.png, /data/b/1\.png; give more of"),
        ([("1.png", "x"), ("1.png", "y")], ["1.png"], r"/data/1\.png has several captions \(line 1, line 2\); keep one"),
        ([("c/1.png", "x"), ("d/1.png", "y")], ["1.png"], "several captions"),
    ],
)
def test_what_is_whose_is_refused_where_it_is_not_clear(captions, images, said):
    with pytest.raises(UserError, match=said):
        matched(captions, *images)


@pytest.mark.parametrize("content", [[{"image": "a.png", "text": "x"}], {"a.png": "x"}, {"image": "a.png", "text": "x"}])
@pytest.mark.parametrize("indent", [None, 2])
def test_one_value_for_the_whole_file_does_as_well(content, indent, tmp_path):
    (tmp_path / "captions.json").write_text("\ufeff" + json.dumps(content, indent=indent), encoding="utf-8")
    if isinstance(content, dict) and "text" in content and indent:
        with pytest.raises(UserError, match="line 1"):  # a single entry over several lines is no format of ours
            read_captions(tmp_path / "captions.json")
    else:
        assert [(caption.name, caption.text) for caption in read_captions(tmp_path / "captions.json")] == [("a.png", "x")]


def test_bad_lines_are_counted_and_named(tmp_path):
    good, bad = (
        '{"image": "a.png", "text": "x"}\n',
        ["{", '{"image": "b.png"}', '{"text": "y"}', "3", '{"image": 1, "text": "z"}'],
    )
    (tmp_path / "captions.jsonl").write_text(good + "\n".join([*bad, "null"]))
    with pytest.raises(UserError, match=r"6 entries without an image .*: line 2, line 3, line 4, line 5, line 6, …"):
        read_captions(tmp_path / "captions.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(tmp_path)


def test_captions_are_what_transformers_says(tiny_blip, pictures, monkeypatch):
    from transformers import BlipForConditionalGeneration, BlipProcessor

    processor, model = BlipProcessor.from_pretrained(tiny_blip), BlipForConditionalGeneration.from_pretrained(tiny_blip).eval()
    wanted = []
    for path in pictures:
        pixels = processor(images=Image.open(path), return_tensors="pt")
        tokens = model.generate(**pixels, max_new_tokens=captions.MAX_NEW_TOKENS, num_beams=3, do_sample=False)
        wanted.append(processor.decode(tokens[0], skip_special_tokens=True).strip())
    made = make_captions(pictures, "cpu", str(tiny_blip), batch_size=3)
    assert made == wanted
    assert len(set(made[:4])) > 1
    assert made[4] == made[0]
    monkeypatch.setattr(captions, "_load", lambda *_: pytest.fail("loaded again"))
    assert make_captions(pictures[::-1], "cpu", str(tiny_blip)) == made[::-1]


def test_what_was_made_before_a_kill_is_kept(tiny_blip, pictures, monkeypatch, tmp_path):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "cache"))
    calls = []

    def load(*_):
        def describe(paths):
            calls.append([path.name for path in paths])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return [f"of {path.name}" for path in paths]

        return describe

    monkeypatch.setattr(captions, "_load", load)
    with pytest.raises(KeyboardInterrupt):
        make_captions(pictures, "cpu", str(tiny_blip), batch_size=2)
    (cache,) = (cache_dir() / "captions-1").iterdir()
    with cache.open("a") as file:
        file.write('{"sha256": "cut sho')
    assert make_captions(pictures, "cpu", str(tiny_blip), batch_size=2) == [f"of {i}.png" for i in (0, 1, 2, 3, 0)]
    assert calls == [["0.png", "1.png"], ["2.png", "3.png"], ["2.png", "3.png"]]
    assert make_captions(pictures, "cpu", str(tiny_blip)) == [f"of {i}.png" for i in (0, 1, 2, 3, 0)]
    assert len(calls) == 3


def test_what_stands_in_the_way_is_said(tiny_blip, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot be loaded .*--captions"):
        make_captions(pictures, "cpu", str(tmp_path))
    with pytest.raises(UserError, match="device"):
        make_captions(pictures, "quantum", str(tiny_blip))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad\.png: not an image"):
        make_captions([*pictures, tmp_path / "bad.png"], "cpu", str(tiny_blip))
    with pytest.raises(UserError, match=r"absent\.png: cannot be read"):
        make_captions([tmp_path / "absent.png"], "cpu", str(tiny_blip))
