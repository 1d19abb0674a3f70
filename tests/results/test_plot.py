"""`etherdiff plot`: the points of its lines, and the picture."""

import sys
from xml.etree import ElementTree

import pytest
from PIL import Image
from synthetic_runs import change_result, write_curve, write_run, write_state

from etherdiff import cli
from etherdiff.adapters.methods import METHODS, label_styles
from etherdiff.config import PlotOptions
from etherdiff.results.figures import COLOURS, DASHES, draw_figure, make_figure
from etherdiff.results.pooling import t_interval
from etherdiff.system.errors import UserError

RATES = (1e-5, 1e-3, 1e-1)


@pytest.fixture
def sweep(tmp_path):
    """ether+ and full at three rates, two seeds each; full diverges at the highest."""
    for method in ("ether+", "full"):
        for number, rate in enumerate(RATES):
            for seed in range(2):
                name = f"{method}-{number}-{seed}"
                options = {"method": method, "learning_rate": rate, "seed": seed}
                options |= {"blocks": None} if method == "full" else {}
                if method == "full" and number == 2:
                    lost = write_run(tmp_path / "runs" / name, None, **options)
                    write_curve(lost, [{"step": 1, "loss": None, "diverged": True}])
                    write_state(tmp_path, name, "error: the loss or its gradient is NaN or infinite at step 1")
                    continue
                run = write_run(tmp_path / "runs" / name, {"dino": 0.4 + 0.1 * number + 0.02 * seed, "clip_t": 0.25}, **options)
                rows = [{"step": step, "loss": 1 / step + seed, "learning_rate": rate} for step in range(1, 5)]
                write_curve(run, [*rows, {"step": 5, "loss": 0.2, "learning_rate": rate, "dino": 0.5 + 0.1 * seed}])
    return tmp_path


def figure(path, **options):
    return make_figure([path], PlotOptions(**({"x": "learning_rate", "y": ("dino",), "output": "figure.png"} | options)))


def test_a_point_is_a_row_of_the_table(sweep):
    (panel,) = figure(sweep).panels
    full, ether = panel.lines
    assert (full.name, ether.name) == ("full", "ether+")
    assert [x for x, _ in ether.points] == list(RATES)
    means = [cell.mean for _, cell in ether.points]
    assert means == pytest.approx([0.41, 0.51, 0.61])
    low, high = t_interval([0.4, 0.42])
    assert (ether.points[0][1].low, ether.points[0][1].high) == pytest.approx((low, high))


def test_where_runs_diverged_there_is_a_mark_and_no_point(sweep):
    (panel,) = figure(sweep).panels
    assert [(line.name, line.diverged, len(line.points)) for line in panel.lines] == [("full", [0.1], 2), ("ether+", [], 3)]
    assert len(figure(sweep).left_out) == 2


def test_the_papers_number_is_drawn_only_where_all_is_as_in_the_paper(sweep):
    assert [line.paper for line in figure(sweep).panels[0].lines] == [None, None]

    def change(result):
        result["paper"]["scores"]["dino"]["differs"] = []

    for number in range(3):
        for seed in range(2):
            change_result(sweep / f"runs/ether+-{number}-{seed}", change)
    full, ether = figure(sweep).panels[0].lines
    assert (full.paper, ether.paper.value) == (None, 0.666)
    assert figure(sweep, paper=False).panels[0].lines[1].paper is None


def test_over_steps_what_was_logged_is_averaged(sweep):
    loss, dino = figure(sweep, x="step", y=("loss", "dino"), lines=("method", "learning_rate")).panels
    assert [line.name for line in loss.lines] == ["full, 1e-05", "full, 0.001", "ether+, 1e-05", "ether+, 0.001", "ether+, 0.1"]
    assert [(step, cell.mean) for step, cell in loss.lines[0].points][:2] == [(1, 1.5), (2, 1.0)]
    assert [(step, cell.mean) for step, cell in dino.lines[0].points] == [(5, pytest.approx(0.55))]


@pytest.mark.parametrize(("options", "said"), [
    ({"x": "learning_rte"}, "did you mean learning_rate"),
    ({"x": "method"}, "it is one of --lines already"),
    ({"x": "subject"}, "--x subject: needs numbers, not ball"),
    ({"y": ("dina",)}, "--y dina: there is no such score or fact; did you mean dino?"),
    ({"y": ()}, "--y: name at least one"),
    ({"y": ("clip_i",)}, "there is nothing to draw of clip_i"),
    ({"lines": ("seeds",)}, "--lines seeds: runs have no such key; did you mean seed?"),
    ({"lines": ("seed",)}, "differ in method"),
    ({"x": "step", "y": ("clip_i",)}, "--y clip_i: metrics.jsonl has no such number (there is loss, dino)"),
    ({"x": "step", "y": ("loss",)}, "differ in learning_rate"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused(sweep, options, said):
    with pytest.raises(UserError) as raised:
        figure(sweep, **options)
    assert said in str(raised.value)


def test_scores_that_were_computed_otherwise_are_refused(sweep):
    change_result(sweep / "runs/ether+-1-0", lambda r: r["scores"]["dino"]["identity"].update(seeds=[9]))
    with pytest.raises(UserError, match="--anyway"):
        figure(sweep)
    assert any("seeds" in remark for remark in figure(sweep, anyway=True).remarks)


def test_every_method_has_a_style_of_its_own():
    styles = label_styles()
    assert styles.keys() == {*METHODS, "none", "oft+magnitude"}
    assert [style.place for style in styles.values()] == list(range(len(styles)))
    assert len({(style.colour, style.marker) for style in styles.values()}) == len(styles)
    assert len({(style.colour, style.dashes) for style in styles.values()}) == len(styles)
    assert {style.colour for style in styles.values()} <= COLOURS.keys()
    assert {style.dashes for style in styles.values()} <= DASHES.keys()


def test_a_picture_has_a_panel_for_each_quantity_and_the_same_bytes_each_time(sweep, tmp_path):
    found = figure(sweep, y=("dino", "clip_t"))
    for name in ("a.png", "b.png", "a.svg", "b.svg"):
        draw_figure(found, tmp_path / name, "of $many$ runs")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        width, height = picture.size
        assert width > 1.8 * height
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0xD5, 0x5E, 0x00), (0, 0, 0)} <= colours  # ether+ and full
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    axes = [one for one in root.iter("{http://www.w3.org/2000/svg}g") if one.get("id", "").startswith("axes_")]
    assert len(axes) == 2


def test_the_command(sweep, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["etherdiff", "plot", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code or 0, *capsys.readouterr()

    output = tmp_path / "figure.png"
    status, out, err = run(sweep, "--x", "learning_rate", "--y", "dino", "--output", output)
    assert (status, out) == (0, "")
    assert "left out: full-2-0, full-2-1" in err.replace("\n", " ")
    assert output.stat().st_size > 10_000
    assert run(sweep, "--x", "learning_rate", "--y", "dino", "--output", tmp_path / "figure.pdf")[0] == 2
    assert run(sweep, "--x", "learning_rate", "--y", "dino", "--output", tmp_path / "nowhere/figure.png")[0] == 2
    assert run(sweep, "--x", "method", "--y", "dino", "--output", output)[0] == 2
