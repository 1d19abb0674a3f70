"""The whole way from files to metrics.json, against plain loops, and everything that must not be averaged in silently."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from eval_toys import black, draw

from etherdiff.eval.compare import combine_subjects
from etherdiff.eval.functional import lpips_distances
from etherdiff.eval.metrics import METRICS, PROMPT_METRICS
from etherdiff.eval.networks import find_backbones
from etherdiff.eval.scores import PromptImages, Scoring, score_images
from etherdiff.images.reading import read_image
from etherdiff.runs.result import differences
from etherdiff.system.errors import UserError

SCORES = {"dino", "clip_i", "clip_t", "lpips_to_real", "lpips_diversity"}
BASELINES = {"dino_real_images", "clip_i_real_images", "lpips_real_images"}


@pytest.fixture
def scoring(specs):
    return Scoring(preset="tiny", backbones=specs, device="cpu", draws=200)


def feature(backbone, path):
    return backbone.encode([backbone.preprocessing.pixels(read_image(path))])[0].double().numpy()


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def test_every_score_is_what_plain_loops_give(photos, prompts, scoring, backbones):
    real, held_out = photos
    scores = score_images(real, held_out, prompts, scoring)["scores"]
    assert set(scores) == SCORES | BASELINES | {"dino_held_out", "clip_i_held_out", "lpips_to_real_held_out"}
    generated = [path for prompt in prompts for path in prompt.images]
    loops = {}
    for name, role in (("dino", "dino"), ("clip_i", "clip")):
        of = {path: feature(backbones[role], path) for path in [*real, *held_out, *generated]}
        loops[name] = np.mean([cosine(of[r], of[g]) for r in real for g in generated])
        loops[f"{name}_held_out"] = np.mean([cosine(of[h], of[g]) for h in held_out for g in generated])
        loops[f"{name}_real_images"] = np.mean([cosine(of[a], of[b]) for a in real for b in real if a != b])
    texts = backbones["clip"].encode_text([prompt.prompt for prompt in prompts]).double().numpy()
    loops["clip_t"] = np.mean(
        [cosine(feature(backbones["clip"], path), texts[n]) for n, prompt in enumerate(prompts) for path in prompt.images]
    )
    layers = {path: torch.from_numpy(feature(backbones["lpips"], path)) for path in [*real, *held_out, *generated]}

    def distance(a, b):
        return float((layers[a] - layers[b]).square().sum())

    loops["lpips_to_real"] = np.mean([distance(r, g) for r in real for g in generated])
    loops["lpips_to_real_held_out"] = np.mean([distance(h, g) for h in held_out for g in generated])
    loops["lpips_real_images"] = np.mean([distance(a, b) for a in real for b in real if a != b])
    loops["lpips_diversity"] = np.mean([distance(a, b) for p in prompts for a in p.images for b in p.images if a != b])
    for name, expected in loops.items():
        assert scores[name]["mean"] == pytest.approx(expected, abs=1e-5), name


def test_the_result_says_how_it_was_made(photos, prompts, scoring):
    real, held_out = photos
    result = score_images(real, held_out, prompts, scoring, {"sampler": "DPM++ 2M", "steps": 25})
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    dino = result["scores"]["dino"]
    assert (dino["n"], dino["pairs"]) == (6, 18)
    assert dino["low"] < dino["mean"] < dino["high"]
    assert dino["interval"] == {"level": 0.95, "over": "images", "draws": 200, "seed": 0}
    identity = dino["identity"]
    assert identity["backbone"]["name"] == "dino"
    assert identity["reference"]["images"] == "training images"
    assert identity["seeds"] == [0, 1, 2]
    assert identity["generation"]["steps"] == 25
    assert {"etherdiff", "torch"} <= set(identity["versions"])
    first, second = result["per_prompt"]
    assert first["prompt"] == "a sks dog in the snow"
    assert first["n"] == 3
    both = [first["scores"]["dino"], second["scores"]["dino"]]
    assert np.mean([one["mean"] for one in both]) == pytest.approx(dino["mean"])
    assert all(not found for found in result["left_out"].values())
    assert result["not_scored"] == {}
    assert str(real[0].parent) not in json.dumps(result)


def test_again_from_the_cache_gives_the_same_numbers(photos, prompts, scoring):
    first = score_images(*photos, prompts, scoring)
    assert score_images(*photos, prompts, scoring) == first


def test_workers_and_batches_change_nothing_but_rounding(photos, prompts, scoring, monkeypatch, tmp_path):
    first = score_images(*photos, prompts, scoring)
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "another"))
    other = score_images(*photos, prompts, replace(scoring, workers=2, batch_size=2))
    for name in first["scores"]:
        assert other["scores"][name]["mean"] == pytest.approx(first["scores"][name]["mean"], abs=1e-6)


def test_the_order_of_images_does_not_matter(photos, prompts, scoring):
    real, held_out = photos
    turned = [replace(p, images=p.images[::-1], seeds=p.seeds[::-1]) for p in prompts]
    one = score_images(real, held_out, prompts, scoring)["scores"]
    other = score_images(real[::-1], held_out[::-1], turned, scoring)["scores"]
    for name in one:
        assert other[name]["mean"] == pytest.approx(one[name]["mean"], abs=1e-9)


def test_a_copy_of_the_real_image_scores_as_one(photos, scoring):
    real, _ = photos
    copies = [PromptImages("a sks dog", (real[0], real[0]), (0, 1), "a dog")]
    scores = score_images(real[:1], [], copies, scoring)["scores"]
    assert scores["dino"]["mean"] == pytest.approx(1)
    assert scores["clip_i"]["mean"] == pytest.approx(1)
    assert scores["lpips_to_real"]["mean"] == 0
    assert scores["lpips_diversity"]["mean"] == 0


def test_prompts_with_and_without_identifier_are_two_scores(photos, prompts, scoring):
    one, other = (
        score_images(*photos, prompts, replace(scoring, metrics=("clip_t",), clip_t_prompt=form))["scores"]["clip_t"]
        for form in ("with identifier", "without identifier")
    )
    assert one["mean"] != other["mean"]
    assert differences(one["identity"], other["identity"]) == ["prompts.form", "prompts.sha256"]
    assert one["identity"]["reference"] is None


def test_many_prompts_are_what_is_drawn_again(photos, tmp_path, scoring):
    many = [PromptImages(f"a sks dog {n}", (draw(tmp_path / f"m{n}.png", 300 + n),), (0,)) for n in range(6)]
    scores = score_images(*photos, many, replace(scoring, metrics=("dino", "lpips_diversity")))
    assert scores["scores"]["dino"]["interval"]["over"] == "prompts"
    assert scores["not_scored"] == {"lpips_diversity": "no prompt has two usable images"}


def test_one_image_has_a_score_but_no_interval(photos, prompts, scoring):
    single = [PromptImages("a sks dog", prompts[0].images[:1], (0,))]
    score = score_images(*photos, single, replace(scoring, metrics=("dino",)))["scores"]["dino"]
    assert (score["low"], score["high"], score["n"]) == (None, None, 1)


# Nothing is scored silently wrong


def spoil(prompts, place, path):
    images = tuple(path if index == place else image for index, image in enumerate(prompts[0].images))
    return [replace(prompts[0], images=images), prompts[1]]


def test_black_images_are_left_out_and_counted(photos, prompts, scoring, tmp_path):
    result = score_images(*photos, spoil(prompts, 1, black(tmp_path / "black.png")), scoring)
    kept = replace(prompts[0], images=prompts[0].images[::2], seeds=prompts[0].seeds[::2])
    expected = score_images(*photos, [kept, prompts[1]], scoring)
    assert result["left_out"]["black"] == [{"kind": "generated", "prompt": "a sks dog in the snow", "seed": 1}]
    for name, score in result["scores"].items():
        assert score["mean"] == pytest.approx(expected["scores"][name]["mean"], abs=1e-7), name
        assert score["n"] == expected["scores"][name]["n"]
    assert [one["n"] for one in result["per_prompt"]] == [2, 3]


def test_unreadable_images_are_left_out_with_the_reason(photos, prompts, scoring, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    result = score_images([*photos[0], tmp_path / "gone.png"], photos[1], spoil(prompts, 0, broken), scoring)
    generated, real = sorted(result["left_out"]["unreadable"], key=lambda one: one["kind"])
    assert (generated["seed"], real["name"]) == (0, "gone.png")
    assert generated["why"]
    assert result["scores"]["dino"]["pairs"] == 3 * 5


def test_images_whose_features_are_not_finite_are_left_out(photos, prompts, scoring, backbones):
    dino, clip = backbones["dino"], backbones["clip"]
    bad = dino.preprocessing.pixels(read_image(prompts[0].images[0]))
    encode = dino.encode

    def spoiled(pixels):
        features = encode(pixels).clone()
        features[[torch.equal(image, bad) for image in pixels]] = torch.nan
        return features

    dino.encode = spoiled
    wanted = replace(scoring, metrics=("dino", "clip_i"))
    result = score_images(*photos, prompts, wanted, loaded={"dino": dino, "clip": clip})
    assert result["left_out"]["bad_features"] == [
        {"kind": "generated", "prompt": "a sks dog in the snow", "seed": 0, "backbone": "dino"}
    ]
    assert (result["scores"]["dino"]["n"], result["scores"]["clip_i"]["n"]) == (5, 6)
    assert math.isfinite(result["scores"]["dino"]["mean"])


def test_a_prompt_that_is_not_read_to_its_end_is_not_in_clip_t(photos, prompts, scoring):
    long = replace(prompts[0], prompt="a sks dog " + "very " * 30 + "happy")
    result = score_images(*photos, [long, prompts[1]], scoring)
    assert [one["tokens_too_many"] > 0 for one in result["left_out"]["long_prompts"]] == [True]
    alone = score_images(*photos, [prompts[1]], scoring)
    assert result["scores"]["clip_t"]["mean"] == pytest.approx(alone["scores"]["clip_t"]["mean"])
    assert result["scores"]["dino"]["n"] == 6
    assert result["per_prompt"][0]["scores"]["clip_t"] is None
    only = score_images(*photos, [long], scoring)
    assert only["not_scored"] == {"clip_t": "every prompt is longer than the text encoder reads"}


def test_images_that_are_missing_are_counted(photos, prompts, scoring):
    short = [replace(prompts[0], wanted=4), replace(prompts[1], images=(), seeds=(), wanted=3)]
    result = score_images(*photos, short, scoring)
    assert result["left_out"]["missing"] == [
        {"prompt": "a sks dog in the snow", "wanted": 4, "found": 3},
        {"prompt": "a red sks dog", "wanted": 3, "found": 0},
    ]
    assert result["per_prompt"][1]["scores"]["dino"] is None
    assert result["scores"]["dino"]["n"] == 3


def test_everything_that_makes_scoring_pointless_is_said_at_once(prompts, scoring):
    wrong = [replace(prompts[0], images=(), seeds=(1,)), replace(prompts[1], images=(), seeds=(), plain_prompt=None)]
    with pytest.raises(UserError) as raised:
        score_images([], [], wrong, replace(scoring, metrics=("dino", "beauty", "clip_t"), clip_t_prompt="without identifier"))
    told = str(raised.value)
    for part in ("'beauty'", "no generated images", "no real images", "0 images but 1 seeds", "no form without identifier"):
        assert part in told
    with pytest.raises(UserError, match="no metric"):
        score_images([], [], prompts, replace(scoring, metrics=()))


def test_where_only_black_images_are_left_it_says_so(photos, scoring, tmp_path):
    only = [PromptImages("a sks dog", (black(tmp_path / "black.png"),), (7,))]
    with pytest.raises(UserError) as raised:
        score_images(*photos, only, replace(scoring, metrics=("lpips_diversity", "clip_t")))
    assert "black: generated, a sks dog, 7" in str(raised.value)


def test_no_usable_real_image_leaves_the_scores_that_need_none(prompts, scoring, tmp_path):
    result = score_images([black(tmp_path / "black.png")], [], prompts, scoring)
    assert set(result["scores"]) == {"clip_t", "lpips_diversity"}
    assert result["not_scored"]["dino"] == "no usable image to compare with"
    assert "two are needed" in result["not_scored"]["dino_real_images"]


# FID


@pytest.fixture
def sets(tmp_path):
    real = [draw(tmp_path / f"set/{n}.png", 1000 + n) for n in range(20)]
    generated = [draw(tmp_path / f"made/{n}.png", 2000 + n) for n in range(20)]
    return real, [PromptImages(f"map {n}", (path,), (n,)) for n, path in enumerate(generated)]


def test_fid_of_files_is_that_of_their_features(sets, scoring, backbones):
    real, generated = sets
    score = score_images(real, [], generated, replace(scoring, metrics=("fid",)))["scores"]["fid"]
    a, b = (np.stack([feature(backbones["fid"], path) for path in side]) for side in (real, [p.images[0] for p in generated]))
    from scipy.linalg import sqrtm

    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * np.trace(sqrtm(s @ t)).real
    assert score["mean"] == pytest.approx(expected, abs=1e-4)
    assert 0 <= score["low"] <= score["mean"] <= score["high"]
    assert (score["n"], score["identity"]["features"]) == (20, 16)


def test_fid_needs_as_many_real_images(sets, scoring):
    real, generated = sets
    with pytest.raises(UserError, match="19 real and 20 generated"):
        score_images(real[:19], [], generated, replace(scoring, metrics=("fid",)))


def test_where_an_image_is_left_out_fid_leaves_out_its_counterpart(sets, scoring, tmp_path):
    real, generated = sets
    spoiled = [*generated[:-1], replace(generated[-1], images=(black(tmp_path / "black.png"),))]
    wanted = replace(scoring, metrics=("fid",))
    score = score_images(real, [], spoiled, wanted)["scores"]["fid"]
    expected = score_images(real[:-1], [], generated[:-1], wanted)["scores"]["fid"]
    assert (score["mean"], score["n"]) == (pytest.approx(expected["mean"]), 19)


def test_fid_of_too_few_images_is_refused(sets, scoring):
    real, generated = sets
    with pytest.raises(UserError, match="too few"):
        score_images(real[:10], [], generated[:10], replace(scoring, metrics=("fid",)))


# Several subjects


@pytest.fixture
def subjects(photos, prompts, scoring):
    real, held_out = photos
    return {
        "one": score_images(real, held_out, prompts, scoring),
        "two": score_images(real[:2], held_out, prompts[:1], scoring),
    }


def test_subjects_are_pooled_over_all_their_pairs(subjects):
    pooled = combine_subjects(subjects, draws=200)
    one, two = (subjects[name]["scores"]["dino"] for name in ("one", "two"))
    score = pooled["scores"]["dino"]
    assert score["mean"] == pytest.approx((one["mean"] * 18 + two["mean"] * 6) / 24)
    assert (score["n"], score["pairs"], score["subjects"]) == (9, 24, 2)
    assert score["interval"]["over"] == "prompts"
    assert score["identity"]["reference"]["n"] == 5
    assert pooled["per_subject"] == subjects


def test_five_subjects_are_drawn_again(subjects):
    five = {str(number): subjects["one" if number % 2 else "two"] for number in range(5)}
    assert combine_subjects(five, draws=50)["scores"]["dino"]["interval"]["over"] == "subjects"


def test_subjects_scored_by_other_networks_are_not_pooled(subjects):
    other = json.loads(json.dumps(subjects["two"]))
    other["scores"]["dino"]["identity"]["backbone"]["weights_sha256"] = "other"
    with pytest.raises(UserError, match=r"dino: two was scored differently from one: backbone\.weights_sha256 differ"):
        combine_subjects({"one": subjects["one"], "two": other})
    with pytest.raises(UserError, match="no subject"):
        combine_subjects({})


def test_loaded_networks_are_used_and_must_be_enough(photos, prompts, scoring, specs):
    loaded = find_backbones(["dino"], "tiny", specs, "cpu")
    assert score_images(*photos, prompts, replace(scoring, metrics=("dino",)), loaded=loaded)["scores"]["dino"]["n"] == 6
    with pytest.raises(UserError, match="no backbone is loaded for clip"):
        score_images(*photos, prompts, replace(scoring, metrics=("dino", "clip_i")), loaded=loaded)


def test_every_metric_can_be_asked_for_by_name(photos, prompts, scoring):
    for name in PROMPT_METRICS:
        if METRICS[name].compares != "sets":
            assert score_images(*photos, prompts, replace(scoring, metrics=(name,)))["scores"][name]["n"] > 0


def test_lpips_distances_of_nothing_have_no_rows():
    assert lpips_distances([], []).shape == (0, 0)
