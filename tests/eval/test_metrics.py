"""Every metric against an independent computation, and one contract over all of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from etherdiff.eval.functional import cosine_pairs, cosine_rows, fid, fid_problem, frechet_distance, moments, upper_pairs
from etherdiff.eval.metrics import CONTROL_METRICS, CONTROL_ROLES, HELD_OUT, METRICS, PROMPT_METRICS, SUBJECT_METRICS, metric_of
from etherdiff.eval.networks import ROLES

WIDTH = 5


def features(count, width=WIDTH, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32))


def cosine(a, b):
    """In float64, number by number."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))


def square(count, seed=0):
    """Distances among images: symmetric, zero on the diagonal."""
    points = features(count, 3, seed).double()
    return (points[:, None] - points[None]).square().sum(-1)


def updates(name, seed=0):
    """Two valid updates of a metric, as arguments."""
    compares, role = METRICS[name].compares, METRICS[name].role
    if compares == "control x generated":
        return [(control(role, seed + n, n), control(role, seed + n + 9, n)) for n in (1, 2)]
    if compares == "sets":
        return [(features(9, seed=seed), True), (features(9, seed=seed + 1), False)]
    if compares == "image x prompt":
        return [(cosine_rows(features(n, seed=seed), features(n, seed=seed + 1)),) for n in (3, 4)]
    if compares in ("images of one prompt", "real x other real"):
        return [(square(n, seed) if role == "lpips" else among(n, seed),) for n in (3, 4)]
    if role == "lpips":
        return [(square(5, seed)[:2, 2:],), (square(5, seed)[2:, :2],)]
    return [(cosine_pairs(features(2, seed=seed), features(n, seed=seed + 1)),) for n in (3, 4)]


def among(count, seed=0):
    """Cosines among images."""
    return cosine_pairs(features(count, seed=seed), features(count, seed=seed))


def control(role, seed, count):
    """What is read from images of 6 x 6 pixels: classes, edges or points."""
    rng = np.random.default_rng(seed)
    if role == "segmenter":
        return torch.from_numpy(rng.integers(0, WIDTH, (count, 6, 6)))
    return torch.from_numpy(rng.random((count, 6, 6)) < 0.4 if role == "edges" else rng.uniform(0, 6, (count, 5, 2)))


def make(name):
    return METRICS[name].make(WIDTH if METRICS[name].compares == "sets" or METRICS[name].role == "segmenter" else 0)


def computed(name, given):
    metric = make(name)
    for update in given:
        metric.update(*update)
    return metric.compute()


@pytest.mark.parametrize("name", METRICS)
class TestContract:
    def test_it_is_a_torchmetrics_metric_that_says_what_it_is(self, name):
        metric, made = METRICS[name], make(name)
        assert isinstance(made, Metric)
        assert metric.name == name
        assert metric.title
        assert metric.definition
        assert made.higher_is_better is metric.higher_is_better
        assert metric.role in (CONTROL_ROLES if metric.compares == "control x generated" else ROLES)
        assert bool(metric.signals) == (metric.compares == "control x generated")
        assert metric.baseline is None or METRICS[metric.baseline].compares == "real x other real"
        assert metric_of(name) is metric_of(name + HELD_OUT) is metric

    def test_its_value_is_one_float64_number_within_its_range(self, name):
        value = computed(name, updates(name))
        assert value.shape == ()
        assert value.dtype == torch.float64
        lowest, highest = METRICS[name].range
        assert lowest <= float(value) <= highest

    def test_the_order_of_updates_does_not_matter(self, name):
        one, other = updates(name)
        assert float(computed(name, [one, other])) == pytest.approx(float(computed(name, [other, one])), abs=1e-12)

    def test_states_of_two_processes_add_up(self, name):
        one, other = updates(name)
        first, second, both = make(name), make(name), make(name)
        first.update(*one)
        second.update(*other)
        for state in first._defaults:
            assert first._reductions[state] is not None
            setattr(both, state, getattr(first, state) + getattr(second, state))
        both._update_count = 1
        assert float(both.compute()) == pytest.approx(float(computed(name, [one, other])), abs=1e-12)

    def test_reset_forgets(self, name):
        metric = make(name)
        for update in updates(name, seed=5):
            metric.update(*update)
        metric.reset()
        for update in updates(name):
            metric.update(*update)
        assert float(metric.compute()) == float(computed(name, updates(name)))

    def test_units_are_what_the_sums_are_made_of(self, name):
        given = updates(name)
        size = make(name).size
        units = torch.cat([METRICS[name].count(*one, size=size) for one in given])
        assert units.shape[1:] == METRICS[name].shape(size)
        assert float(METRICS[name].value(units.sum(0).numpy())) == float(computed(name, given))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_is_refused(self, name, bad):
        """Of whatever type the metric takes: classes and edges are no floats at all."""
        (update, *_) = updates(name)
        tensors = [place for place, value in enumerate(update) if isinstance(value, torch.Tensor)]
        assert tensors
        for place in tensors:
            spoiled = update[place].clone() if update[place].is_floating_point() else update[place].double()
            spoiled[(0,) * (spoiled.ndim - 1)][-1] = bad
            with pytest.raises(ValueError, match=r"finite|integers|bool"):
                make(name).update(*update[:place], spoiled, *update[place + 1 :])

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_nothing_has_no_score(self, name):
        with pytest.raises((ValueError, RuntimeError)):
            make(name).compute()


@pytest.mark.parametrize("name", [name for name in METRICS if METRICS[name].compares != "sets"])  # one side has no distance
def test_forward_gives_the_score_of_each_update_and_sums_all(name):
    metric, parts = make(name), updates(name)
    assert [float(metric(*one)) for one in parts] == [float(computed(name, [one])) for one in parts]
    assert float(metric.compute()) == float(computed(name, parts))


def test_dino_and_clip_i_are_the_mean_over_all_pairs():
    real, generated = features(3), features(4, seed=1)
    expected = np.mean([cosine(r, g) for r in real for g in generated])
    for name in ("dino", "clip_i"):
        assert float(computed(name, [(cosine_pairs(real, generated),)])) == pytest.approx(expected, abs=1e-12)


def test_pairs_count_the_same_however_updates_are_cut():
    real = features(3)
    parts = [features(2, seed=1), features(7, seed=2)]
    pieces = computed("dino", [(cosine_pairs(real, part),) for part in parts])
    whole = computed("dino", [(cosine_pairs(real, torch.cat(parts)),)])
    assert float(pieces) == pytest.approx(float(whole), abs=1e-12)


def test_clip_t_is_the_mean_over_images_and_their_own_prompts():
    images, texts = features(4), features(4, seed=1)
    expected = np.mean([cosine(image, text) for image, text in zip(images, texts, strict=True)])
    assert float(computed("clip_t", [(cosine_rows(images, texts),)])) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="do not match"):
        cosine_rows(images, texts[:3])


def test_lpips_to_real_and_diversity_are_plain_means():
    table = square(4)
    flat = float(computed("lpips_to_real", [(table[:, :3],)]))
    assert flat == pytest.approx(np.mean([float(table[i, j]) for i in range(4) for j in range(3)]))
    among = float(computed("lpips_diversity", [(table,)]))
    assert among == pytest.approx(np.mean([float(table[i, j]) for i in range(4) for j in range(i)]))


@pytest.mark.parametrize("name", ["dino_real_images", "clip_i_real_images", "lpips_real_images"])
def test_real_images_leave_out_an_image_and_itself(name):
    table = updates(name)[1][0]
    both_ways = [float(table[i, j]) for i in range(4) for j in range(4) if i != j]  # as the scripts count them
    assert float(computed(name, [(table,)])) == pytest.approx(np.mean(both_ways), abs=1e-12)


def test_zero_features_have_no_direction():
    with pytest.raises(ValueError, match="zero"):
        cosine_pairs(torch.zeros(2, 3), features(2, 3))


def test_pairs_need_a_square():
    with pytest.raises(ValueError, match="square"):
        upper_pairs(torch.zeros(2, 3))


vectors = st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 10**6)))


@settings(deadline=None, max_examples=50)
@given(vectors, vectors, st.floats(1e-3, 1e3))
def test_cosines_stay_in_range_and_know_no_length_or_order(one, other, factor):
    a, b = features(one[0], seed=one[1]), features(other[0], seed=other[1])
    table = cosine_pairs(a, b)
    assert table.shape == (len(a), len(b))
    assert float(table.abs().max()) <= 1
    torch.testing.assert_close(cosine_pairs(b, a), table.T)
    torch.testing.assert_close(cosine_pairs(a * factor, b), table, atol=1e-5, rtol=0)
    torch.testing.assert_close(cosine_pairs(a.flip(0), b), table.flip(0))
    torch.testing.assert_close(cosine_rows(a, a), torch.ones(len(a), dtype=torch.float64))
    forward, backward = (float(computed("dino", [(one,)])) for one in (table, cosine_pairs(b, a)))
    assert forward == pytest.approx(backward, abs=1e-12)


def test_frechet_distance_of_normals_that_commute_has_a_closed_form():
    mean, other_mean = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0])
    deviations, other_deviations = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 5.0])
    found = frechet_distance(mean, torch.diag(deviations**2), other_mean, torch.diag(other_deviations**2))
    assert float(found) == pytest.approx(3**2 + 4**2 + (2 - 1) ** 2 + (3 - 5) ** 2)


class AsIs(torch.nn.Module):
    """The network of torchmetrics' FID whose images are features already."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features


@pytest.mark.parametrize(("count", "width"), [(40, 5), (7, 12)])
def test_fid_against_scipy_and_torchmetrics(count, width):
    real, generated = features(count, width), features(count, width, seed=1) * 1.5 + 0.3
    metric, theirs = METRICS["fid"].make(width), FrechetInceptionDistance(feature=AsIs(width))
    for one in (metric, theirs):
        one.update(real[:4], True)
        one.update(real[4:], True)
        one.update(generated, False)
    a, b = real.double().numpy(), generated.double().numpy()
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t) - 2 * np.trace(sqrtm(s @ t)).real
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-5)
    assert float(metric.compute()) == pytest.approx(float(theirs.compute()), abs=1e-5)
    assert fid(real, generated) == pytest.approx(float(metric.compute()), abs=1e-5)


def test_fid_of_a_set_with_itself_is_zero_and_symmetric():
    a, b = features(30), features(30, seed=3)
    ours, back, same = (
        float(computed("fid", [(real, True), (generated, False)])) for real, generated in ((a, b), (b, a), (a, a))
    )
    assert ours == pytest.approx(back, rel=1e-9)
    assert same == pytest.approx(0, abs=1e-9)


def test_fid_needs_two_images_on_each_side_and_features_of_its_width():
    with pytest.raises(ValueError, match="nothing to score"):
        computed("fid", [(features(9), True), (features(1), False)])
    with pytest.raises(ValueError, match=r"finite features \(N, 5\)"):
        make("fid").update(features(9, 6), True)


def test_moments_are_numpys():
    a = features(9).double()
    mean, covariance = moments(a.sum(0), a.T @ a, 9)
    np.testing.assert_allclose(mean, a.numpy().mean(0))
    np.testing.assert_allclose(covariance, np.cov(a.numpy(), rowvar=False))


def test_fid_says_when_it_would_mislead():
    assert fid_problem(2000, 2000, 2048) is None
    assert fid_problem(200, 200, 64) is None
    assert "same number" in (fid_problem(5, 100, 64) or "")
    assert "too few" in (fid_problem(200, 200, 2048) or "")
    assert "too few" in (fid_problem(64, 64, 64) or "")


def test_subjects_are_scored_without_fid():
    assert set(SUBJECT_METRICS) < set(METRICS)
    assert "fid" not in SUBJECT_METRICS


def test_every_control_is_scored_by_what_reads_it_and_by_fid_and_nothing_else_is():
    told = {name for names in CONTROL_METRICS.values() for name in names}
    assert told == {"fid", *(name for name, entry in METRICS.items() if entry.compares == "control x generated")}
    assert all("fid" in names for names in CONTROL_METRICS.values())
    assert set(PROMPT_METRICS) == set(METRICS) - told | {"fid"}
    assert set(SUBJECT_METRICS) < set(PROMPT_METRICS)
