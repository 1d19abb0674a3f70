"""What the page says of a run, of half a run and of a damaged one."""

import base64
import json
import re
from dataclasses import replace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from report_runs import (
    picture,
    score,
    write_curves,
    write_evaluation,
    write_refitted_run,
    write_run,
    write_samples,
)
from test_markup import HOSTILE, PARTS, Parsed

from etherdiff.config import S2IConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.images.writing import save_png
from etherdiff.report import write_report
from etherdiff.report.contents import read_contents
from etherdiff.report.html import Album
from etherdiff.results.facts import fact
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.runs.model import count_trained
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.text import size
from etherdiff.tasks.subjects import find_subject

TAGS = {
    "a", "bdi", "body", "circle", "code", "dd", "details", "div", "dl", "dt", "figcaption", "figure", "footer", "g", "h1", "h2",
    "h3", "head", "header", "html", "i", "img", "li", "line", "link", "main", "meta", "nav", "p", "polyline", "pre", "rect",
    "section", "span", "strong", "style", "summary", "svg", "table", "tbody", "td", "text", "th", "thead", "title", "tr", "ul",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with everything, of a base whose adapter has drifted; its report has been written."""
    root = tmp_path_factory.mktemp("whole")
    for number in range(3):
        (root / "subject").mkdir(exist_ok=True)
        picture(number).save(root / "subject" / f"{number}.png")
    run = write_run(root / "run", find_base("tiny"), subject=str(root / "subject"))
    write_curves(run)
    write_evaluation(run)
    write_samples(run)
    write_report(run)
    return run


def read(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


def test_every_section_is_there(whole):
    page = (whole / "report.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Before and after", "During training", "Scores", "Prompt by prompt", "Learning curves", "Cost", "Drift from the base",
        "Settings",
    ]  # fmt: skip
    assert page.count('<a href="#') == len(headings)


def test_scores_stand_beside_the_base_the_real_images_and_the_papers(whole):
    text = Parsed((whole / "report.html").read_text()).text
    assert "ether+0.6430.612 … 0.6710.666100" in text  # the paper's 0.666, of the same setting
    assert "base0.4020.371 … 0.430–100" in text
    assert "ether+, to held-out images0.601" in text
    assert "real images0.7810.750 … 0.8090.7035" in text
    assert "0.240" not in text  # the paper's CLIP-T, of another setting
    assert "FID: 100 images of 64 features: at least 128 are needed" in text


def test_what_was_left_out_is_counted_and_marked_on_its_image(whole):
    page = (whole / "report.html").read_text()
    assert "black images, as a safety checker leaves them10" in Parsed(page).text
    assert page.count("left out: black") == 1


def test_cost_and_drift(whole):
    text = Parsed((whole / "report.html").read_text()).text
    for said in ("1.3 images/s", "9.0 GiB", "30 min 43 s", "eval: score31.5 s", "‖W′ − W‖, all layers", "All 56 layers"):
        assert said in text
    shapes = re.search(r"trainable parameters([\d,]+)", text)
    assert shapes is not None
    unet = load_base(find_base("tiny")).unet
    attention = [m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert int(shapes[1].replace(",", "")) == sum(2 * (layer.in_features + layer.out_features) for layer in attention)  # ether+


def test_the_same_run_gives_the_same_page_and_nothing_of_this_machine(whole):
    before = (whole / "report.html").read_bytes()
    assert write_report(whole).read_bytes() == before
    assert str(whole.parent).encode() not in before


def test_nothing_is_fetched_and_nothing_runs(whole):
    page = (whole / "report.html").read_text()
    seen = Parsed(page)
    assert set(seen.tags) <= TAGS
    links = [value for name, value in seen.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert all(value.startswith(("data:", "#")) for value in links)
    assert not re.search(r"url\(|@import|https?:", page)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in seen.attributes


@pytest.mark.parametrize("prompts", [HOSTILE])
def test_prompts_and_settings_are_only_text(tmp_path, prompts):
    run = write_run(tmp_path / "run <b>", identifier='"><script>', class_noun="<i>كلب</i>", subject="<img src=x>")
    write_evaluation(run, prompts, seeds=1)
    result = json.loads((run / "eval" / "metrics.json").read_text())
    hostile = HOSTILE[0]
    result["scores"][hostile] = {
        "mean": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 3,
        "interval": {"over": hostile},
        "identity": {hostile: hostile},
    }
    result["scores"][prompts[1]] = {"mean": prompts[2]}
    result["not_scored"] = {hostile: hostile}
    result["left_out"] = {hostile: [{hostile: hostile}], "black": [{"prompt": prompts[1], "seed": 0, "kind": "\ud800"}]}
    result["run"] = {"checkpoint": hostile, "step": 3}
    (run / "eval" / "metrics.json").write_text(json.dumps(result))
    (run / "best").mkdir()
    (run / "best" / "best.json").write_text(json.dumps({"step": 1, "score": 0.5, "why": hostile}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, hostile: 2.0}))
    (run / "cost.json").write_text(json.dumps({"seconds": {hostile: 1}, "device": hostile}))
    seen = Parsed(read(run))
    assert set(seen.tags) <= TAGS
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    for prompt in prompts:
        assert prompt in seen.text


def test_a_run_that_was_not_scored_says_how(tmp_path):
    run = write_run(tmp_path / "my run")
    page = read(run)
    assert f"etherdiff eval &#39;{run}&#39;" in page
    assert "There is no adapter yet" in page
    write_samples(run)
    assert read(run).count("<img") == 2 * 4 * 4


def test_damaged_parts_are_said_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    write_curves(run, steps=10, every=5)
    write_evaluation(run, ["a sks ball"], seeds=2)
    (run / "eval" / "metrics.json").write_text('{"scores": {"dino"')
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 11, "lo')
    (run / "cost.json").write_text("[]")
    (run / "eval" / "images" / "000-ball" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run / "adapter").mkdir()
    text = Parsed(read(run)).text
    for said in (
        "metrics.json cannot be read",
        "1 of 11 lines of metrics.jsonl",
        "cost.json cannot be read (it is not a JSON object)",
        "unreadable:",
    ):
        assert said in text
    assert "Learning curves" in text


@pytest.mark.parametrize("value", [None, [], {}, "x", 3, float("nan")])
def test_values_of_another_kind_than_expected(tmp_path, value):
    run = write_run(tmp_path / "run")
    keys = ("scores", "per_prompt", "left_out", "not_scored", "base", "run", "paper")
    (run / "eval").mkdir()
    for content in (
        dict.fromkeys(keys, value),
        {key: {"dino": value, "black": value} for key in keys},
        {"per_prompt": [value]},
    ):
        (run / "eval" / "metrics.json").write_text(json.dumps(content))
        (run / "cost.json").write_text(json.dumps(dict.fromkeys(("seconds", "images_per_second", "device"), value)))
        assert "Scores" in read(run)


def test_a_base_that_changed_or_went_is_said(tmp_path):
    run = write_run(tmp_path / "run", find_base("tiny"))
    text = (run / "run.yaml").read_text()
    base = str(find_base("tiny").local_path)
    (run / "run.yaml").write_text(
        text.replace(f"path: {base}", "path: /nowhere/at/all").replace("base: tiny", "base: /nowhere")
    )
    assert "no longer where the run found it" in read(run)
    (run / "run.yaml").write_text(text)
    recorded = json.loads((run / "adapter" / "base.json").read_text())
    recorded["fingerprint"]["unet"] = "0" * 64
    (run / "adapter" / "base.json").write_text(json.dumps(recorded))
    assert "not those the adapter was trained on" in read(run)


def test_images_stay_within_their_budget(tmp_path):
    paths = []
    for seed in range(6):
        paths.append(tmp_path / f"{seed}.png")
        picture(seed, side=512).save(paths[-1])
    album = Album(len(paths), budget=9_000)
    shown = "".join(PARTS.picture(album.picture(path, "x")) for path in paths)
    assert len(re.search(r'src="(.*?)"', shown)[1]) <= album.spent <= 9_000
    assert 0 < shown.count("<img") < 6
    assert album.not_shown == shown.count("not shown") == 6 - shown.count("<img")
    assert Album(10).side == 320
    assert Album(100_000).side == 112


def test_small_images_are_kept_to_the_pixel_and_lose_what_their_files_tell(tmp_path):
    save_png(picture(1), tmp_path / "small.png", {"prompt": "secret"})
    shown = PARTS.picture(Album(1).picture(tmp_path / "small.png", "x"))
    assert 'class="pixels"' in shown
    assert "image/png" in shown
    content = base64.b64decode(re.search(r"base64,([^\"]+)", shown)[1])
    assert b"secret" not in content


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize("root", ["the tiny world", "a data root", "the hub"])
def test_photos_of_a_named_subject_are_shown(tmp_path, monkeypatch, root):
    name = "candy_ball" if root == "the tiny world" else "dog"
    settings = {"subject": name, "class_noun": None}
    photos = 5
    if root != "the tiny world":
        folder, photos = tmp_path / "data" / "dreambooth" / name, 2
        folder.mkdir(parents=True)
        for number in range(photos):
            picture(number).save(folder / f"{number}.jpg")
        if root == "a data root":
            settings["data_root"] = tmp_path / "data"
        else:
            (tmp_path / "data" / "dreambooth").rename(tmp_path / "dataset")
            asked = []

            def found(*_, local_files_only=False, **__):
                asked.append(local_files_only)
                return str(tmp_path)

            monkeypatch.setattr("huggingface_hub.snapshot_download", found)
    run = write_run(tmp_path / "run", **settings)
    seen = Parsed(read(run))
    photos = len(find_subject(name, settings.get("data_root")).images)
    assert f"Trained on {photos} images:" in seen.text
    assert sum(value == "training image 1" for _, value in seen.attributes) == 2  # alt and title
    if root == "the hub":
        assert asked[0] is True  # the report downloads nothing


def test_photos_that_are_nowhere_are_no_error(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert "Trained on" not in Parsed(read(write_run(tmp_path / "run", subject="dog"))).text


def test_magnitudes_are_reported_with_the_adapter_that_they_were_learned_on(tmp_path):
    run = write_refitted_run(tmp_path / "run")
    opened = Run.open(run)
    text = Parsed(read(run)).text
    assert "oft+magnitude on stripes" in text
    count = fact(opened, "trainable_parameters")
    assert count > count_trained(replace(opened, folder=RunFolder(tmp_path / "oft")))
    assert f"trainable parameters{count:,.0f}" in text
    both = sum(path.stat().st_size for folder in opened.adapters for path in folder.iterdir())
    assert f"adapter on disk{size(both)}" in text
    drift = read_contents(run).drift
    assert sum(one.weight for one in drift.values()) / len(drift) == pytest.approx(fact(opened, "weight_distance"))
    assert "Magnitudes on top of the adapter that they were learned on" in text


def test_a_step_that_was_skipped_is_not_the_one_at_which_a_run_diverged(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [{"step": 1, "loss": None, "learning_rate": 1e-3}, {"step": 2, "loss": 0.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Parsed(read(run)).text
    assert "1 step skipped" in text
    assert "Training ended" not in text
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "loss": None, "diverged": True}))
    text = Parsed(read(run)).text
    assert "1 step skipped" in text
    assert "Training ended at step 3: its loss or its weights became NaN or infinite." in text


def test_a_controllable_run_shows_its_sheet_its_classes_and_the_sets_beside(tmp_path):
    config = S2IConfig(base="tiny", dataset="stripes", method="ether+", steps=7, output=tmp_path / "run")
    (tmp_path / "run" / "eval").mkdir(parents=True)
    write_settings(RunFolder(tmp_path / "run"), "s2i", config, {})
    picture(1, side=300).save(tmp_path / "run" / "eval" / "sheet.png")
    miou = score(0.5, n=8, over="images")
    result = {
        "scores": {"miou": miou},
        "per_class": [
            {"name": "<sky>", "iou": 0.75, "accuracy": 0.8, "pixels_wanted": 1200},
            {"name": "sea", "iou": None, "accuracy": None, "pixels_wanted": 0},
        ],
        "beside": {"shuffled_images": {"scores": {"miou": miou | {"mean": 0.1, "low": 0.05, "high": 0.2}}}},
        "left_out": {"no_face": [{"pair": "7"}]},
        "run": {"checkpoint": "last", "step": 7},
    }
    (tmp_path / "run" / "eval" / "metrics.json").write_text(json.dumps(result))
    page = read(tmp_path / "run")
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Control and image",
        "Scores",
        "Class by class",
        "Drift from the base",
        "Settings",
    ]
    text = Parsed(page).text
    for told in ("ether+ on stripes", "ether+0.5000.469 … 0.528", "with another's control0.1000.050 … 0.200", "sea––0"):
        assert told in text
    assert "<sky>0.7500.8001,200" in text
    assert "images in which no face is found10which" in text
