import pytest

from etherdiff.system.errors import Answer, Problems, UserError


def fail(error):
    raise error


def test_everything_wrong_is_in_one_error():
    problems = Problems()
    assert not problems
    base = problems.attempt(fail, UserError(["no base", "no tokenizer"]))
    options = problems.attempt(int, "four")
    images = problems.attempt(fail, FileNotFoundError("no images"))
    problems.add("output: is a file", "device: there is none")
    with pytest.raises(UserError) as caught:
        problems.settle(base, options, images)
    wrong_number = "invalid literal for int() with base 10: 'four'"
    expected = ["no base", "no tokenizer", wrong_number, "no images", "output: is a file", "device: there is none"]
    assert caught.value.problems == expected == problems.found


def test_settle_gives_the_values_in_order():
    problems = Problems()
    assert problems.settle(problems.attempt(int, "4"), problems.attempt(str.upper, "a")) == (4, "A")
    assert problems.settle(problems.attempt(int, "ff", base=16)) == (255,)


def test_an_answer_is_there_though_its_value_is_none_or_false():
    problems = Problems()
    assert problems.attempt(lambda: None)
    assert problems.attempt(int, "0")
    assert problems.settle(problems.attempt(lambda: None)) == (None,)


def test_then_attempts_only_on_an_answer_that_is_there():
    problems = Problems()
    assert problems.then(Answer(4), str).value == "4"
    assert not problems.then(problems.attempt(int, "four"), lambda number: fail(AssertionError(number)))
    assert len(problems.found) == 1
    assert not problems.then(Answer("five"), int)
    assert len(problems.found) == 2


def test_check_notes_the_sentences_of_a_function():
    problems = Problems()
    problems.check(lambda: ["one", "two"])
    problems.check(list)
    problems.check(lambda: fail(OSError("cannot look")))
    assert problems.found == ["one", "two", "cannot look"]


def test_what_is_no_mistake_of_the_user_is_raised():
    with pytest.raises(KeyError):
        Problems().attempt(fail, KeyError("bug"))
    with pytest.raises(ValueError, match="nothing was noted"):
        Problems().settle(Answer(None, there=False))


def test_a_prefix_is_before_every_sentence():
    problems = Problems("runs/a: ")
    problems.add("steps: must be at least 1")
    problems.attempt(fail, UserError(["no base", "no images"]))
    assert problems.found == ["runs/a: steps: must be at least 1", "runs/a: no base", "runs/a: no images"]


def test_what_many_have_wrong_is_said_once():
    problems = Problems()
    for name in ("one", "two", "three"):
        problems.of(name).add("no base")
    problems.of("two", "eval: ").add("metrics: none")
    for name in ("one", "three"):
        problems.of(name).attempt(fail, UserError("no subject"))
    problems.add("the file is empty")
    with pytest.raises(UserError) as caught:
        problems.raise_if_any("sweep.yaml: ", total=3)
    assert caught.value.problems == [
        "sweep.yaml: no base",
        "sweep.yaml: eval: metrics: none (run two)",
        "sweep.yaml: no subject (run one, and 1 more)",
        "sweep.yaml: the file is empty",
    ]
