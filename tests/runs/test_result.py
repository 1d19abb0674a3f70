"""metrics.json and its like as records: what is damaged is named, the rest is read."""

import json

import pytest

from etherdiff.runs.result import Best, Cost, EvalResult, read_record, read_result
from etherdiff.system.errors import UserError

SCORE = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 4, "pairs": 20, "identity": {"definition": "a mean"}}
WHOLE = {
    "scores": {"dino": SCORE, "fid": SCORE | {"low": None, "high": None, "pairs": None}},
    "per_prompt": [{"prompt": "a ball", "n": 2, "scores": {"dino": {"mean": 0.5, "pairs": 10}, "clip_t": None}}],
    "left_out": {"black": [{"prompt": "a ball", "seed": 2}]},
    "not_scored": {"clip_t": "too long"},
    "base": {"scores": {"dino": SCORE}},
    "run": {"checkpoint": "last", "step": 3, "weights_sha256": "ab"},
    "paper": {"scope": "30 subjects", "scores": {"dino": {"value": 0.6, "differs": []}}},
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_whole_result_is_read_and_keeps_what_it_does_not_know(tmp_path):
    write(tmp_path / "eval/metrics.json", WHOLE)
    result = read_result(tmp_path)
    assert (result.scores["dino"].mean, result.scores["fid"].low, result.base.scores["dino"].n) == (0.5, None, 4)
    assert result.run.model_extra == {"weights_sha256": "ab"}
    assert result.model_dump(exclude_unset=True) == WHOLE


DAMAGES = {
    "dino": lambda result: result["scores"]["dino"].update(mean="much"),
    "fid": lambda result: result["scores"]["fid"].update(high=1.0),
    "per_prompt": lambda result: result.update(per_prompt=[3]),
    "left_out": lambda result: result.update(left_out={"black": 3}),
    "base": lambda result: result["base"]["scores"].update(dino=None),
    "paper": lambda result: result["paper"]["scores"]["dino"].pop("value"),
    "run": lambda result: result.pop("run"),
    "scores": lambda result: result.update(scores=[]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_part_is_named_and_left_out(tmp_path, name):
    content = json.loads(json.dumps(WHOLE))
    DAMAGES[name](content)
    path = write(tmp_path / "eval/metrics.json", content)
    with pytest.raises(UserError, match=rf"not what etherdiff eval writes \({name}\): score it again"):
        read_result(tmp_path)
    result, damaged = read_record(EvalResult, path)
    assert damaged == ([] if name == "run" else [name])
    assert set(result.scores) == (set() if name == "scores" else {"dino", "fid"} - {name})


@pytest.mark.parametrize("content", ["[]", '{"scores": {"dino"', "\0", "[" * 100_000])
def test_what_is_no_object_cannot_be_read(tmp_path, content):
    write(tmp_path / "eval/metrics.json", content)
    with pytest.raises(UserError, match=r"metrics\.json cannot be read .*score it again with etherdiff eval"):
        read_result(tmp_path)


def test_where_there_is_no_result(tmp_path):
    with pytest.raises(UserError, match="has not been scored: etherdiff eval"):
        read_result(tmp_path)
    with pytest.raises(UserError, match="there is no such run folder"):
        read_result(tmp_path / "nowhere")


def test_numbers_that_are_none_are_damage(tmp_path):
    for value in ("NaN", "Infinity", "true", '"3"', "1" + "0" * 400):
        path = write(tmp_path / "cost.json", f'{{"images_per_second": {value}, "steps": 3}}')
        cost, damaged = read_record(Cost, path)
        assert (cost.images_per_second, cost.steps, damaged) == (None, 3, ["images_per_second"])


def test_a_record_without_what_it_needs_cannot_be_read(tmp_path):
    path = write(tmp_path / "best.json", {"step": "three", "score": 0.5})
    with pytest.raises(UserError, match="it has no step"):
        read_record(Best, path)
