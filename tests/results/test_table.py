"""`etherdiff table`: what stands in it, what it refuses, and its four formats."""

import csv
import io
import json
import shutil
from html.parser import HTMLParser

import pytest
from scipy import stats
from synthetic_runs import change_result, score, write_curve, write_run, write_scores, write_state

from etherdiff.config import PerturbConfig, TableOptions, read_config
from etherdiff.eval.paper import PAPER_S2I, PAPER_SUBJECTS
from etherdiff.results.formats import as_csv, as_html, as_markdown
from etherdiff.results.tables import make_table
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.system.errors import UserError

SUBJECTS = ("ball", "box", "cup", "star", "lamp", "hat")
TOPS = {"ether+": 0.66, "lora": 0.64, "oft": 0.62}


@pytest.fixture
def sweep(tmp_path):
    """Three methods on six subjects, each 0.01 better than the one before."""
    for method, top in TOPS.items():
        for place, subject in enumerate(SUBJECTS):
            scores = {"dino": top + 0.01 * place, "clip_i": 0.8, "clip_t": 0.26 - top / 10, "lpips_to_real": 0.7}
            options = {"blocks": None} if method == "lora" else {}
            write_run(tmp_path / "runs" / f"{method}-{subject}", scores, method=method, subject=subject, **options)
    return tmp_path


def row(table, *values):
    return next(one for one in table.rows if one.values == values and not one.reference)


def table_of(path, **options):
    return make_table([path], read_config(TableOptions, None, [], {"columns": ("dino", "clip_t")} | options))


def lines(text):
    return [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in text.splitlines() if line.startswith("|")]


def test_a_row_is_a_mean_over_subjects(sweep):
    table = table_of(sweep)
    assert [one.values for one in table.rows if not one.reference] == [("lora",), ("oft",), ("ether+",)]
    cell = row(table, "ether+").cells["dino"]
    assert (cell.mean, cell.over, len(cell.values)) == (pytest.approx(0.685), "6 subjects", 6)
    assert cell.low < 0.685 < cell.high
    assert any("[intervals] are 95% intervals over subjects" in remark for remark in table.remarks)


def test_the_best_of_a_column_is_marked_by_the_scores_own_direction(tmp_path):
    for method, (miou, fid) in {"oft": (0.2, 30.0), "ether+": (0.3, 40.0), "none": (0.1, 50.0)}.items():
        write_run(tmp_path / method, {"miou": miou, "fid": fid}, task="s2i", method=method)
    table = make_table([tmp_path], TableOptions(columns=("miou", "fid")))
    best = [(one.values[0], name) for one in table.rows for name in ("miou", "fid") if table.is_best(one, name)]
    assert best == [("oft", "fid"), ("ether+", "miou")]


def test_the_papers_numbers_stand_beside_and_say_where_they_differ(sweep):
    table = table_of(sweep)
    assert row(table, "ether+").paper["dino"].value == PAPER_SUBJECTS["ether+"]["dino"]
    assert [one.paper["dino"].value for one in table.rows if one.reference == "real images"] == [0.703]
    assert any("the base is not Stable Diffusion 1.5" in remark for remark in table.remarks)
    assert table_of(sweep, paper=False).shows_paper == frozenset()


def test_the_paper_has_no_number_for_what_was_not_trained(tmp_path):
    path = tmp_path / "random"
    path.mkdir()
    config = PerturbConfig(base="tiny", subject="ball", method="naive", distance=2, output=path)
    write_settings(RunFolder(path), "perturb", config, {"base": {"name": "tiny", "fingerprint": {"unet": "abc"}}})
    write_scores(path, {"dino": score(0.6)}, config)
    table = table_of(tmp_path, rows=("method", "distance"))
    assert row(table, "naive", 2.0).cells["dino"].mean == 0.6
    assert row(table, "naive", 2.0).paper == {}


def test_controllable_runs_have_table_3s_columns_and_a_row_of_their_own_when_refitted(tmp_path):
    for seed in range(3):
        oft = write_run(tmp_path / f"oft-{seed}", {"miou": 0.2 + 0.01 * seed, "fid": 31.0}, task="s2i", method="oft", seed=seed)
        again = {"miou": 0.22 + 0.01 * seed, "fid": 30.0}
        write_run(tmp_path / f"refit-{seed}", again, task="s2i", method="oft", seed=seed, refit=oft, steps=60)
    table = make_table([tmp_path], TableOptions(columns=("miou", "fid")))
    assert [one.values for one in table.rows] == [("oft",), ("oft+magnitude",)]
    assert row(table, "oft+magnitude").paper["miou"].value == PAPER_S2I["oft+magnitude"]["miou"] == 0.246
    cell = row(table, "oft").cells["miou"]
    low, high = stats.t.interval(0.95, 2, loc=0.21, scale=stats.sem([0.2, 0.21, 0.22]))
    assert (cell.over, cell.low, cell.high) == ("3 seeds", pytest.approx(low), pytest.approx(high))


def test_the_usual_columns_are_those_of_the_paper_that_are_there(sweep):
    names = [column.name for column in make_table([sweep], TableOptions()).columns]
    assert names == ["trainable_parameters", "dino", "clip_i", "clip_t", "lpips_to_real"]


def test_real_images_and_the_base_stand_above_and_are_never_the_best(sweep):
    table = table_of(sweep)
    assert [one.reference for one in table.rows][:2] == ["real images", "the base"]
    real, base = table.rows[:2]
    assert (real.cells["dino"].mean, base.cells["dino"].mean) == (pytest.approx(0.8), pytest.approx(0.3))
    assert "clip_t" not in real.cells
    assert table.is_best(row(table, "ether+"), "dino")
    assert not table.is_best(real, "dino")


# --- What must not be averaged or compared ---------------------------------------------------------------------------


def test_runs_that_differ_in_more_than_seed_and_subject_are_not_averaged(sweep):
    write_run(sweep / "runs/other", {"dino": 0.5}, method="oft", subject="ball", learning_rate=0.1)
    with pytest.raises(UserError, match=r"'oft' differ in learning_rate: 0.006, 0.1: add what distinguishes them to --rows"):
        table_of(sweep)
    assert len(table_of(sweep, rows=("method", "learning_rate")).rows) == 4 + 2


def test_a_run_counts_once(sweep):
    write_run(sweep / "copy", {"dino": 0.5}, method="oft", subject="ball")
    with pytest.raises(UserError, match="are the same run twice: leave one of them out"):
        table_of(sweep)


def test_subjects_in_folders_of_one_name_are_two_subjects(tmp_path):
    for owner, dino in (("ann", 0.5), ("ben", 0.7)):
        write_run(tmp_path / owner, {"dino": dino, "clip_t": 0.3}, subject=f"/photos/{owner}/dog")
    table = table_of(tmp_path)
    assert row(table, "ether+").cells["dino"].mean == pytest.approx(0.6)
    by_subject = table_of(tmp_path, rows=("subject",))
    assert [one.values for one in by_subject.rows if not one.reference] == [("/photos/ann/dog",), ("/photos/ben/dog",)]


def test_datasets_in_folders_of_one_name_are_not_averaged(tmp_path):
    for owner, seed in (("ann", 0), ("ben", 1)):
        write_run(tmp_path / owner, {"miou": 0.3, "fid": 40.0}, task="s2i", dataset=f"/data/{owner}/rooms", seed=seed)
    with pytest.raises(UserError, match="differ in dataset: /data/ann/rooms, /data/ben/rooms"):
        make_table([tmp_path], TableOptions(columns=("miou", "fid")))


def test_runs_of_bases_with_other_weights_are_not_averaged(sweep):
    run = sweep / "runs/oft-ball/run.yaml"
    text = run.read_text().partition("\n")[2].replace("unet: abc", "unet: def")
    run.write_text(text)
    with pytest.raises(UserError, match="the base's weights"):
        table_of(sweep)


def alter(identity, path, value):
    *parents, last = path.split("/")
    for key in parents:
        identity = identity[key]
    identity[last] = value


OTHERWISE = {"backbone/name": "facebook/dino-vitb8", "generation/steps": 50, "prompts/form": "without identifier"}


@pytest.mark.parametrize("path", OTHERWISE)
def test_scores_that_were_computed_otherwise_are_refused_and_marked_anyway(sweep, path):
    change_result(sweep / "runs/oft-cup", lambda r: alter(r["scores"]["dino"]["identity"], path, OTHERWISE[path]))
    with pytest.raises(UserError, match=f"scored differently from the first run: {path.replace('/', '.')}") as raised:
        table_of(sweep)
    assert str(sweep / "runs/oft-cup") in str(raised.value)
    assert "--anyway" in str(raised.value)
    table = table_of(sweep, anyway=True)
    assert row(table, "oft").cells["dino"].differs
    assert not row(table, "oft").cells["clip_t"].differs
    assert not row(table, "lora").cells["dino"].differs
    assert "0.6450\\*" in as_markdown(table)


@pytest.mark.parametrize("path", ["reference/sha256", "prompts/sha256", "seeds"])
def test_subjects_have_their_own_images_and_prompts_but_a_subject_has_not_two(sweep, path):
    change_result(sweep / "runs/oft-cup", lambda r: alter(r["scores"]["dino"]["identity"], path, "others"))
    with pytest.raises(UserError, match=path.replace("/", ".")):
        table_of(sweep)


def test_other_versions_of_libraries_are_only_told(sweep):
    change_result(sweep / "runs/oft-cup", lambda r: alter(r["scores"]["dino"]["identity"], "versions/torch", "3.0"))
    assert "torch 3.0 and 2.9, which may change the last digits" in table_of(sweep).remarks
    change_result(sweep / "runs/oft-cup", lambda r: alter(r["scores"]["dino"]["identity"], "versions/etherdiff", "0.2"))
    with pytest.raises(UserError, match=r"etherdiff: 0\.1\.0, here 0\.2"):
        table_of(sweep)


@pytest.mark.parametrize(("options", "said"), [
    ({"rows": ("metod",)}, "--rows metod: runs have no such key; did you mean method?"),
    ({"rows": ()}, "--rows: name at least one key"),
    ({"columns": ("dyno",)}, "--columns dyno: there is no such score or fact; did you mean dino?"),
    ({"columns": ("dino", "dino")}, "names a column twice"),
    ({"columns": ()}, "--columns: name at least one"),
    ({"best": "method"}, "--best method: it is one of --rows already"),
    ({"best": "subject"}, "--best subject: needs numbers above 0, not"),
    ({"best": "learning_rate", "columns": ("trainable_parameters",)}, "--best: needs a score among --columns"),
    ({"share": 0.5}, "--share: it applies to --best only"),
    ({"share": 1.5, "best": "learning_rate"}, "share: must be at most 1, not 1.5"),
])  # fmt: skip
def test_what_is_asked_for_wrongly_is_refused(sweep, options, said):
    with pytest.raises(UserError) as raised:
        table_of(sweep, **options)
    assert said in str(raised.value)


def test_a_table_is_of_one_task(sweep):
    write_run(sweep / "s2i", {"miou": 0.2}, task="s2i")
    with pytest.raises(UserError, match="a table is of one task"):
        table_of(sweep, rows=("method", "task"))


# --- What is missing -------------------------------------------------------------------------------------------------


def test_runs_left_out_are_counted_in_their_row_and_listed(sweep):
    (sweep / "runs/oft-cup/eval/metrics.json").unlink()
    write_state(sweep, "oft-cup", "error: the disk is full")
    table = table_of(sweep)
    assert row(table, "oft").left_out == 1
    assert "rows of different subjects: oft is without cup" in table.remarks
    for text in (as_markdown(table), as_html(table), as_csv(table)):
        assert "oft-cup" in text
        assert "the disk is full" in text
    assert "5 (5 subjects), 1 left out" in as_markdown(table)


def test_rows_of_one_subject_each_are_not_said_to_lack_others(sweep):
    remarks = table_of(sweep, rows=("method", "subject")).remarks
    assert not [remark for remark in remarks if "rows of different subjects" in remark]
    assert "[intervals] are 95% intervals over prompts, resampled, of these subjects and trained adapters" in remarks


def test_a_score_that_some_runs_lack_is_told_with_the_reason(sweep):
    def change(result):
        del result["scores"]["clip_t"]
        result["not_scored"]["clip_t"] = "every prompt is too long"

    change_result(sweep / "runs/oft-cup", change)
    table = table_of(sweep)
    assert len(row(table, "oft").cells["clip_t"].values) == 5
    assert "no clip_t: oft-cup (every prompt is too long)" in table.remarks


def test_what_is_not_known_of_a_run_is_told(sweep):
    table = table_of(sweep, columns=("trainable_parameters",))
    assert all(one.cells == {} for one in table.rows)
    assert any(remark.startswith("no trainable_parameters: ") and "it has no adapter" in remark for remark in table.remarks)


# --- The best of a setting -------------------------------------------------------------------------------------------


@pytest.fixture
def rates(tmp_path):
    """ether+ is 0.5, 1.0, 0.95, 0.8 over four decades; oft 0.6, 0.9 and then diverges."""
    for method, scores in {"ether+": (0.5, 1.0, 0.95, 0.8), "oft": (0.6, 0.9)}.items():
        for place, value in enumerate(scores):
            rate = 10.0 ** (place - 4)
            write_run(tmp_path / f"runs/{method}-{place}", {"dino": value}, method=method, learning_rate=rate)
    lost = write_run(tmp_path / "runs/oft-2", None, method="oft", learning_rate=1e-2)
    write_curve(lost, [{"step": 7, "loss": None, "diverged": True}])
    write_state(tmp_path, "oft-2", "error: the loss or its gradient is NaN or infinite at step 7; the weights are")
    return tmp_path


def test_per_row_the_best_rate_and_how_wide_the_good_ones_are(rates):
    table = table_of(rates, columns=("dino",), best="learning_rate")
    ether, oft = row(table, "ether+"), row(table, "oft")
    assert (ether.best, ether.cells["dino"].mean) == (1e-3, 1.0)
    assert ether.plateau.decades == pytest.approx(1 + 1 / 3 + 1 / 5)
    assert (oft.best, oft.left_out) == (1e-3, 1)
    # 0.81 lies three tenths of the way from 0.9 down to 0.6; at 0.01 it diverged
    assert oft.plateau.decades == pytest.approx(0.3)
    assert not oft.plateau.is_lower_bound


def test_how_much_of_the_best_is_good_enough_can_be_said(rates):
    table = table_of(rates, columns=("dino",), best="learning_rate", share=0.75)
    # 0.75 lies half of the way from 1.0 down to 0.5; 0.8 at the end of what was tried is good enough
    assert row(table, "ether+").plateau.decades == pytest.approx(2 + 1 / 2)
    assert row(table, "ether+").plateau.open_high
    assert "75% of the row's own best" in as_markdown(table)


def test_a_rate_at_which_one_run_of_several_diverged_is_not_held_for_good(rates):
    write_run(rates / "runs/oft-2b", {"dino": 0.95}, method="oft", learning_rate=1e-2, seed=1)
    oft = row(table_of(rates, columns=("dino",), best="learning_rate"), "oft")
    assert (oft.best, oft.plateau.high) == (1e-3, 1e-3)


def test_where_the_grid_ends_the_width_is_a_lower_bound(rates):
    shutil.rmtree(rates / "runs/oft-2")
    (rates / "states/oft-2.json").unlink()
    table = table_of(rates, columns=("dino",), best="learning_rate")
    assert row(table, "oft").plateau.open_high
    assert "≥ 0.3 (5.0e-04 to ≥ 0.001)" in as_markdown(table)


def test_the_best_rate_can_be_that_of_the_lowest_validation_loss(tmp_path):
    for place, (loss, value) in enumerate([(0.4, 0.9), (0.2, 0.5), (0.25, 0.7)]):
        run = write_run(tmp_path / f"{place}", {"dino": value}, method="ether+", learning_rate=10.0 ** (place - 4))
        write_curve(run, [{"step": 300, "validation_loss": loss}])
    table = table_of(tmp_path, columns=("validation_loss", "dino"), best="learning_rate", share=0.8)
    best = row(table, "ether+")
    assert (best.best, best.cells["validation_loss"].mean, best.cells["dino"].mean) == (1e-3, 0.2, 0.5)
    # 0.2 / 0.8 = 0.25: a quarter of the way from 0.2 up to 0.4, and just so at the end of what was tried
    assert (best.plateau.decades, best.plateau.open_high) == (pytest.approx(1 + 1 / 4), True)
    assert any("by validation_loss" in remark and "best / 0.8 or less" in remark for remark in table.remarks)


def test_the_best_rate_can_be_that_of_likeness_and_prompt_together(tmp_path):
    for rate, (dino, clip_t) in {1e-3: (0.36, 0.49), 1e-2: (0.64, 0.36), 1e-1: (0.81, 0.16)}.items():
        write_run(tmp_path / f"{rate}", {"dino": dino, "clip_t": clip_t}, method="ether+", learning_rate=rate)
    best = row(table_of(tmp_path, columns=("dino_clip_t", "dino"), best="learning_rate", share=0.875), "ether+")
    assert (best.best, best.cells["dino_clip_t"].mean, best.cells["dino"].mean) == (1e-2, pytest.approx(0.48), 0.64)
    assert best.plateau.low == pytest.approx(1e-3)  # 0.6 * 0.7 = 0.42 = 0.875 * 0.48
    assert best.plateau.high == pytest.approx(10**-1.5)  # 0.9 * 0.4 = 0.36: halfway down


def test_what_is_made_of_scores_is_refused_and_marked_as_they_are(sweep):
    change_result(sweep / "runs/oft-cup", lambda r: alter(r["scores"]["clip_t"]["identity"], "backbone/name", "another"))
    with pytest.raises(UserError, match=r"scored differently from the first run: backbone\.name.*\(clip_t\)"):
        table_of(sweep, columns=("dino_clip_t",))
    table = table_of(sweep, columns=("dino", "dino_clip_t"), anyway=True)
    assert row(table, "oft").cells["dino_clip_t"].differs
    assert not row(table, "oft").cells["dino"].differs
    assert not row(table, "lora").cells["dino_clip_t"].differs


# --- Formats ---------------------------------------------------------------------------------------------------------


def test_csv_has_every_digit_and_every_run(sweep):
    table = table_of(sweep)
    rows = {line["method"]: line for line in csv.DictReader(io.StringIO(as_csv(table))) if line["row"] == "runs"}
    cell, line = row(table, "ether+").cells["dino"], rows["ether+"]
    assert (float(line["dino"]), float(line["dino_low"]), float(line["dino_high"])) == (cell.mean, cell.low, cell.high)
    assert (line["runs"], line["subjects"], line["seeds"], line["dino_over"]) == ("6", "6", "1", "6 subjects")
    values = dict(pair.split("=") for pair in line["dino_values"].split("; "))
    assert {name: float(value) for name, value in values.items()} == cell.values
    assert (line["dino_paper"], line["dino_paper_differs"]) == ("0.666", "the base is not Stable Diffusion 1.5")


def test_markdown_is_a_table_with_the_best_in_bold(sweep):
    head, rule, *body = lines(as_markdown(table_of(sweep)))
    assert {len(line) for line in (head, rule, *body)} == {len(head)}
    assert head[:3] == ["method", "runs", "DINO ↑"]
    assert [line[0] for line in body if line[2].startswith("**")] == ["ether+"]


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_html_is_one_page_that_asks_for_nothing_and_runs_nothing(sweep):
    evil = "<script>alert(1)</script>"
    write_run(sweep / "runs/evil", {"dino": 0.5}, method="ether", subject="ball", class_noun="x")
    change_result(sweep / "runs/evil", lambda r: r["not_scored"].update(clip_t=evil))
    page = Reader()
    page.feed(as_html(table_of(sweep)))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe")]
    assert [values["href"] for _, values in page.tags if "href" in values] == ["data:,"]
    assert evil in "".join(page.text)


def test_the_command(sweep, etherdiff_, tmp_path):
    status, out, err = etherdiff_("table", sweep, "--columns", "dino,clip_t")
    assert (status, err) == (0, "")
    assert "0.6850" in out
    assert "[0." in out
    (sweep / "runs/oft-cup/eval/metrics.json").unlink()
    assert "left out: oft-cup" in etherdiff_("table", sweep, "--columns", "dino")[1]
    status, out, err = etherdiff_("table", sweep, "--format", "csv", "--columns", "dino")
    assert (status, out.splitlines()[0][:10]) == (0, "method,row")
    assert "left out: oft-cup" in err
    for name, beginning in (("t.md", "| method"), ("t.html", "<!doctype html>"), ("t.csv", "method,"), ("t.txt", "\n")):
        status, out, err = etherdiff_("table", sweep, "--columns", "dino", "--output", tmp_path / name)
        assert (status, out) == (0, "")
        assert "left out: oft-cup" in err.replace("\n", " ")
        assert (tmp_path / name).read_text().lstrip(" ").startswith(beginning)
    assert etherdiff_("table", sweep, "--format", "pdf")[0] == 2
    assert etherdiff_("table", tmp_path / "nowhere")[0] == 2


def test_scores_may_hold_no_interval(tmp_path):
    for seed, mean in enumerate((0.5, 0.6)):
        write_run(tmp_path / str(seed), {"dino": mean}, seed=seed)
    one = score(0.5) | {"low": None, "high": None}
    (tmp_path / "0/eval/metrics.json").write_text(json.dumps({"scores": {"dino": one}, "run": {}}))
    cell = row(table_of(tmp_path, rows=("seed",), columns=("dino",)), 0).cells["dino"]
    assert (cell.low, cell.over) == (None, "")
