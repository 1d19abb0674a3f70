"""`etherdiff compare`: scores in one table only where they were computed the same way."""

import copy
import json
import os

import pytest
from rich.console import Console

from etherdiff.eval.compare import BASE, as_json, as_markdown, as_table, compare
from etherdiff.system.errors import UserError


def score(mean, **identity):
    versions = {"etherdiff": "0.1.0", "torch": "2.9"}
    known = {
        "definition": "mean cosine",
        "backbone": {
            "name": "facebook/dino-vits16",
            "revision": "abc",
            "weights_sha256": "0123456789abcdef" * 4,
            "preprocessing": {"size": [224, 224]},
            "versions": {"transformers": "5.0"},
        },
        "prompts": {"n": 25, "form": "with identifier", "sha256": "aa"},
        "seeds": [0, 1, 2, 3],
        "generation": {"steps": 25, "versions": {"diffusers": "0.40"}},
        "versions": versions,
    }
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 100, "pairs": 500, "identity": known | identity}


@pytest.fixture
def results():
    """Of two runs that were scored alike."""

    def result(method, mean):
        facts = {"subject": "dog", "method": method, "base_model": "sd15", "checkpoint": "last", "step": 1200}
        base = {"scores": {"dino": score(0.3)}}
        return {"scores": {"dino": score(mean), "clip_t": score(0.24)}, "base": base, "run": facts}

    return {"ether": result("ether+", 0.666), "lora": result("lora", 0.66)}


@pytest.fixture
def write(tmp_path):
    def writer(results):
        runs = []
        for name, result in results.items():
            (tmp_path / name / "eval").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "eval/metrics.json").write_text(json.dumps(result))
            runs.append(tmp_path / name)
        return runs

    return writer


def at(content, path):
    """The dictionary that holds the last key of a path, and that key."""
    *parents, last = path.split("/")
    for key in parents:
        content = content[key]
    return content, last


def test_runs_that_were_scored_alike_stand_beside_each_other(results, write):
    columns = compare(write(results))
    assert [column.name for column in columns] == [BASE, "ether", "lora"]
    assert [column.scores["dino"].mean for column in columns] == [0.3, 0.666, 0.66]
    found = as_json(columns)
    assert found["scores"]["dino"]["lora"] == {"mean": 0.66, "low": 0.65, "high": 0.67, "n": 100}
    assert (found["differences"], found["versions"]) == ({}, {})


OTHERWISE = {
    "backbone/name": "facebook/dino-vitb8",
    "backbone/revision": "def",
    "backbone/weights_sha256": "f" * 64,
    "backbone/preprocessing": {"size": [256, 256]},
    "prompts/sha256": "bb",
    "prompts/form": "without identifier",
    "seeds": [5, 6, 7, 8],
    "generation/steps": 50,
    "definition": "another",
    "versions/etherdiff": "0.2.0",
}


@pytest.mark.parametrize("path", OTHERWISE)
def test_whatever_else_differs_is_named_and_refused(results, write, path):
    content, key = at(results["lora"]["scores"]["dino"]["identity"], path)
    content[key] = OTHERWISE[path]
    with pytest.raises(UserError) as raised:
        compare(write(results))
    named = path.replace("/", ".").removeprefix("versions.")
    assert f"lora was scored differently from ether: {named}" in str(raised.value)
    assert "(dino)" in str(raised.value)
    columns = compare(write(results), anyway=True)
    assert list(as_json(columns)["differences"]["lora"]) == ["dino"]
    assert "0.6600* [" in as_markdown(columns)
    assert "\\* lora was computed differently" in as_markdown(columns) or "* lora was computed differently" in as_markdown(
        columns
    )


def test_another_number_of_images_is_refused(results, write):
    results["lora"]["scores"]["clip_t"]["n"] = 99
    with pytest.raises(UserError, match=r"n: 100, here 99 \(clip_t\)"):
        compare(write(results))


def test_differences_that_all_scores_share_are_said_once(results, write):
    for one in results["lora"]["scores"].values():
        one["identity"]["seeds"] = [9]
    with pytest.raises(UserError) as raised:
        compare(write(results))
    assert len(raised.value.problems) == 2
    assert raised.value.problems[0].endswith("seeds (dino, clip_t)")
    assert "--anyway" in raised.value.problems[1]


@pytest.mark.parametrize("path", ["versions/torch", "backbone/versions/transformers", "generation/versions/diffusers"])
def test_other_versions_of_libraries_are_only_warned_of(results, write, path):
    content, key = at(results["lora"]["scores"]["dino"]["identity"], path)
    before, content[key] = content[key], "9.9"
    columns = compare(write(results))
    assert as_json(columns)["versions"] == {"lora": [f"{key} 9.9 ({before})"]}
    assert f"{key} 9.9 ({before})" in as_markdown(columns)


def test_a_score_that_only_one_has_leaves_a_gap(results, write):
    del results["lora"]["scores"]["clip_t"]
    columns = compare(write(results))
    line = next(line for line in as_markdown(columns).splitlines() if line.startswith("| clip_t"))
    assert line.endswith("|  |")


def test_bases_that_scored_otherwise_are_not_shown(results, write):
    results["lora"]["base"]["scores"]["dino"]["mean"] = 0.31
    assert [column.name for column in compare(write(results))] == ["ether", "lora"]
    results["lora"]["base"] = None
    assert [column.name for column in compare(write(results))] == ["ether", "lora"]


def test_markdown_is_a_table(results, write):
    rows = [line.split("|") for line in as_markdown(compare(write(results))).splitlines() if line]
    assert {len(row) for row in rows} == {6}  # a name, three columns, and what is outside the bars
    assert [row[1].strip() for row in rows[:3]] == ["", "---", "subject"]


def test_a_table_for_people(results, write):
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(as_table(compare(write(results))))
    text = console.export_text()
    for part in ("ether", "lora", "0.6660 [0.6560, 0.6760]", "step", "1200"):
        assert part in text


def test_runs_of_one_name_are_told_apart(results, write, tmp_path):
    runs = write({"a/run": results["ether"], "b/run": results["lora"]})
    assert [column.name for column in compare(runs)[1:]] == [str(run) for run in runs]


def test_what_cannot_be_compared_is_refused_at_once(results, write, tmp_path):
    (run, _) = write(copy.deepcopy(results))
    with pytest.raises(UserError, match="two run folders or more"):
        compare([run])
    unscored, broken, foreign = (tmp_path / name for name in ("unscored", "broken", "foreign"))
    for folder, text in ((broken, "{"), (foreign, "[]"), (tmp_path / "old", '{"scores": 1, "run": 2}')):
        (folder / "eval").mkdir(parents=True)
        (folder / "eval/metrics.json").write_text(text)
    unscored.mkdir()
    with pytest.raises(UserError) as raised:
        compare([run, unscored, broken, foreign, tmp_path / "old", tmp_path / "nowhere"])
    assert len(raised.value.problems) == 5
    assert f"{unscored} has not been scored: etherdiff eval {unscored}" in raised.value.problems


def test_the_command(results, write, etherdiff_):
    runs = write(results)
    status, out, _ = etherdiff_("compare", *runs, "--json")
    assert (status, json.loads(out)["columns"][1]["method"]) == (0, "ether+")
    status, out, _ = etherdiff_("compare", *runs, "--markdown")
    assert (status, out.startswith("|")) == (0, True)
    assert "0.6660" in etherdiff_("compare", *runs)[1]
    results["lora"]["scores"]["dino"]["identity"]["seeds"] = [9]
    status, out, err = etherdiff_("compare", *write(results))
    assert (status, out) == (2, "")
    assert "seeds" in err
    assert etherdiff_("compare", *runs, "--anyway")[0] == 0
    assert etherdiff_("compare", *runs, "--json", "--markdown")[0] == 2
