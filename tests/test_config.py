"""Recipes, settings and flags: what wins, and what a user is told about every mistake."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etherdiff import config as config_module
from etherdiff.adapters.methods import METHODS, TARGETS
from etherdiff.config import METHOD_NAMES, TARGET_NAMES, DreamBoothConfig, TrainConfig, load_run_config, read_config
from etherdiff.families.diffusion import PAPER_SAMPLING, S2I_SAMPLING
from etherdiff.runs.folder import RunFolder, write_settings
from etherdiff.system.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def read(recipe: Path | None = None, set_: tuple[str, ...] = (), **flags) -> DreamBoothConfig:
    return read_config(DreamBoothConfig, recipe, list(set_), {"subject": "dog", **flags})


def problems(*args, **flags) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*args, **flags)
    return caught.value.problems


def test_flags_win_over_settings_and_settings_over_the_recipe(recipe):
    path = recipe("steps: 1\nseed: 1\nbatch_size: 1\nwarmup_steps: 1\n")
    config = read(path, ("seed=2", "batch_size=2", "batch_size=3"), batch_size="4", steps=None)
    assert (config.steps, config.seed, config.batch_size, config.warmup_steps) == (1, 2, 4, 1)
    assert config.adam_beta2 == TrainConfig.model_fields["adam_beta2"].default


def test_every_mistake_is_in_one_message(recipe):
    found = problems(recipe("stepz: 4\nblocks: 0\nflip: perhaps\n"), ("no-equals-sign", "min_snr_gamma=-1"), seed="x")
    assert len(found) == 6
    for part in ("stepz", "blocks", "flip", "no-equals-sign", "min_snr_gamma", "seed"):
        assert sum(line.removeprefix("--set ").startswith(part) for line in found) == 1, (part, found)


def test_the_loss_is_weighted_in_one_way(recipe):
    (found,) = problems(recipe("min_snr_gamma: 5\ndebiased_estimation: true\n"))
    assert found.startswith("debiased_estimation: weighs the loss as min_snr_gamma does")


def test_a_missing_option_is_named_with_what_it_is():
    with pytest.raises(UserError, match=r"subject: is needed \(folder of images"):
        read_config(DreamBoothConfig, None, [], {})


@pytest.mark.parametrize(
    ("written", "meant"),
    [("learning-rate", "learning_rate"), ("learnin_rate", "learning_rate"), ("stpes", "steps"), ("metod", "method")],
)
def test_a_misspelt_option_is_met_with_the_right_one(recipe, written, meant):
    assert problems(recipe(f"{written}: 1"))[0].endswith(f"did you mean {meant}?")


def test_an_unrecognisable_option_is_met_with_all_of_them(recipe):
    (found,) = problems(recipe("qqqqqq: 1"))
    assert all(name in found for name in DreamBoothConfig.model_fields)


NOT_RECIPES = {
    "a tab": ("steps:\n\tseed: 1", "not valid YAML"),
    "a tab after the colon": ("steps:\t4", "not valid YAML"),
    "an alias": ("seed: &a 1\nsteps: *a", "aliases"),
    "an alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]", "aliases"),
    "a repeated key": ("steps: 1\nseed: 0\nsteps: 2", "steps given twice"),
    "a list": ("- steps", "key: value"),
    "a text": ("steps", "key: value"),
    "a number as a key": ("1: 2", "key: value"),
    "deep nesting": ("[" * 3000, "not valid YAML"),
    "two documents": ("steps: 1\n---\nsteps: 2", "not valid YAML"),
    "a program": ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
}


@pytest.mark.parametrize("name", NOT_RECIPES)
def test_what_is_no_recipe_is_refused_by_name(recipe, name):
    text, said = NOT_RECIPES[name]
    path = recipe(text)
    (found,) = problems(path)
    assert found.startswith(f"{path}: ")
    assert said in found


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2001-13-45",
        "seed: " + "1" * 5000,
        "seed: 0x" + "f" * 5000,
        "!!map abc",
        "!!set abc",
        "seed: !!int x",
        "seed: !!float x",
        "seed: !!bool x",
        "seed: !!timestamp x",
    ],
    ids=["date", "huge number", "huge hex", "map", "set", "int", "float", "bool", "timestamp"],
)
def test_values_that_break_yamls_own_constructors_are_mistakes_of_the_recipe(recipe, text):
    problems(recipe(text))


@pytest.mark.parametrize("value", ["2001-13-45", "1" * 5000, "!!int x", "{a: " * 3000])
def test_settings_that_break_yamls_own_constructors_are_mistakes_too(value):
    problems(None, (f"seed={value}",))


def test_an_empty_recipe_is_one(recipe):
    assert read(recipe("")) == read(recipe("# nothing\n")) == read()


def test_unreadable_recipes_are_refused_by_name(tmp_path, recipe):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"identifier: caf\xe9\xff\n")
    assert "cannot be read" in problems(latin)[0]
    assert "no such recipe" in problems(tmp_path / "missing.yaml")[0]
    assert "cannot be read" in problems(tmp_path)[0]  # a folder
    assert "not valid YAML" in problems(recipe("a: \x00"))[0]


def test_a_huge_recipe_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse: reading it would take all memory
    assert "too large" in problems(path)[0]
    small = tmp_path / "small.yaml"
    small.write_text("steps: 7 #" + "x" * 100)
    monkeypatch.setattr(config_module, "MAX_RECIPE_BYTES", small.stat().st_size)
    assert read(small).steps == 7
    monkeypatch.setattr(config_module, "MAX_RECIPE_BYTES", small.stat().st_size - 1)
    assert "too large" in problems(small)[0]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "1e400"])
@pytest.mark.parametrize("option", [name for name, f in TrainConfig.model_fields.items() if "float" in str(f.annotation)])
def test_no_option_takes_what_is_not_finite(recipe, option, value):
    (found,) = problems(recipe(f"{option}: {value}"))
    assert found.startswith(f"{option}: ")
    assert problems(None, (f"{option}={value}",))
    assert problems(**{option: value})


WRONG = {
    "steps": ["0", "-1", "1.5", "many", "[1]", "{a: 1}"],
    "batch_size": ["0", "half"],
    "seed": ["-1", str(2**63), "0.5"],
    "learning_rate": ["0", "-1e-3", "fast", "[1]"],
    "dropout": ["1", "-0.1"],
    "caption_dropout": ["1.0", "2"],
    "ema_decay": ["0", "1"],
    "adam_beta1": ["1", "-0.1"],
    "max_grad_norm": ["0"],
    "weight_decay": ["-1"],
    "min_snr_gamma": ["0"],
    "flip": ["perhaps", "2", "[true]"],
    "method": ["ethr", "Ether", "3", "[ether]"],
    "targets": ["everything"],
    "mixed_precision": ["fp8", "16"],
    "lr_schedule": ["exponential"],
    "crop": ["left"],
    "subject": ['""', '"  "', "[dog]", "null"],
    "class_noun": ['""'],
    "identifier": ['""', "null"],
    "sample_prompts": ["[[1]]", "3"],
    "checkpoint_every": ["0"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
def test_wrong_values_are_named_with_what_was_given(recipe, option, value):
    with pytest.raises(UserError) as caught:
        read_config(
            DreamBoothConfig, recipe(f"subject: dog\n{option}: {value}" if option != "subject" else f"subject: {value}"), [], {}
        )
    (found,) = caught.value.problems
    assert found.split(":")[0].split(".")[0] == option
    assert ", not " in found or "must not be empty" in found


def test_numbers_may_be_text(recipe):
    config = read(recipe("learning_rate: 6e-3\nweight_decay: '1e-2'\nsteps: '12'\nprior_weight: 1\n"), ("ema_decay=9e-1",))
    assert (config.learning_rate, config.weight_decay, config.steps, config.ema_decay) == (6e-3, 1e-2, 12, 0.9)
    assert yaml.safe_load("6e-3") == "6e-3"  # YAML's rule, which is why text has to do
    assert read(learning_rate="6e-3", steps="12").learning_rate == 6e-3


def test_a_setting_is_yaml(recipe):
    config = read(None, ("sample_prompts=[a sks dog, a dog]", "flip=true", "blocks=null", "output=runs/a=b"), flip=None)
    assert config.sample_prompts == ("a sks dog", "a dog")
    assert config.flip is True
    assert config.blocks is None
    assert config.output == Path("runs/a=b")


def test_mixed_precision_can_be_written_as_the_help_says(recipe):
    assert read(recipe("mixed_precision: no")).mixed_precision == "no"
    assert read(None, ("mixed_precision=no",)).mixed_precision == "no"


def test_the_settings_a_run_records_are_a_recipe_for_the_same_run(tmp_path):
    config = read(
        method="ether",
        learning_rate="6e-3",
        sample_prompts=["a sks dog", "été: «[x]»"],
        output=tmp_path,
        mixed_precision="bf16",
        seed=2**63 - 1,
        identifier="null",  # a text, in spite of YAML
        class_noun="1e3",
    )
    run = RunFolder(tmp_path)
    write_settings(run, "dreambooth", config, {"anything": 1})
    assert read_config(DreamBoothConfig, run.settings, [], {}) == config
    content = yaml.safe_load(run.settings.read_text(encoding="utf-8"))
    content.pop("provenance")
    assert load_run_config(DreamBoothConfig, content) == config
    assert not {"overwrite", "dry_run"} & set(content)


def test_recorded_settings_that_do_not_fit_are_all_named():
    with pytest.raises(UserError) as caught:
        load_run_config(DreamBoothConfig, {"subject": "dog", "steps": 0, "nonsense": 1})
    assert len(caught.value.problems) == 2


def test_the_names_offered_are_the_names_there_are():
    assert tuple(METHODS) == METHOD_NAMES
    assert set(TARGET_NAMES) == set(TARGETS)


def every_model(cls=config_module.Options) -> set[type[config_module.Options]]:
    return {cls}.union(*map(every_model, cls.__subclasses__()))


@pytest.mark.parametrize("cls", sorted(every_model(), key=lambda cls: cls.__name__))
def test_every_option_is_described(cls):
    for name, field in cls.model_fields.items():
        assert field.description, name
        assert len(field.description) > 5, name
        assert not field.description.endswith("."), name


WRONG = [
    (config_module.ResumeOptions, {"steps": 0, "on_nan": "go on"}),
    (config_module.GenerateOptions, {"num": 0, "batch_size": 0, "seed": 2**63, "steps": 0, "resolution": -1, "device": "gpu"}),
    (config_module.GenerateOptions, {"scale": "nan", "control_scale": "inf", "guidance_scale": "nan", "output": "a\0b"}),
    (config_module.GenerateOptions, {"scale": 1e30, "control_scale": -101, "guidance_scale": 1e38, "num": "two"}),
    (config_module.GenerateOptions, {"guidance_scale": -1, "seed": 2**63 - 3}),
    (config_module.SubjectEvalOptions, {"num": 2**63 + 1}),
    (config_module.ControlEvalOptions, {"guidance_scale": 101}),
    (config_module.SubjectEvalOptions, {"num": 0, "seed": -1, "steps": 0, "batch_size": 0, "device": "gpu"}),
    (config_module.ControlEvalOptions, {"num_maps": 0, "seed": 2**63, "guidance_scale": "inf", "real": "perhaps"}),
    (config_module.TableOptions, {"share": 0, "format": "pdf", "paper": 3}),
    (config_module.MergeOptions, {"scale": "nan", "dtype": "fp8"}),
    (config_module.MergeOptions, {"scale": 101}),
    (config_module.ExportOptions, {"scale": "-inf", "format": "gguf"}),
    (config_module.InspectOptions, {"task": "s3i", "method": ["none"], "targets": "all", "blocks": 0, "rank": 0}),
    (config_module.CheckOptions, {"signal": "smell"}),
    (config_module.SweepOptions, {"jobs": 0, "retries": -1}),
]


@pytest.mark.parametrize(("cls", "values"), WRONG)
def test_what_is_out_of_bounds_is_refused_at_once(cls, values):
    needed = {name: "x" for name, field in cls.model_fields.items() if field.is_required()}
    with pytest.raises(UserError) as caught:
        read_config(cls, None, [], needed | values)
    assert {problem.split(":")[0].split(".")[0] for problem in caught.value.problems} == values.keys()


def test_every_image_has_a_seed_within_bounds():
    """The last one may have the largest."""
    last = {"seed": 2**63 - 5, "num": 5}
    assert config_module.SubjectEvalOptions(**last).num == config_module.GenerateOptions(output="x", **last).num == 5


PATHS_OR_NAMES = {"base", "subject", "dataset", "palette", "recipe"}


@pytest.mark.parametrize("cls", sorted(every_model(), key=lambda cls: cls.__name__))
def test_the_home_folder_may_begin_every_path_of_every_command(cls, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    needed = {name: ["x"] if name == "y" else "x" for name, field in cls.model_fields.items() if field.is_required()}
    for name, field in cls.model_fields.items():
        kind, is_path = str(field.annotation), "pathlib" in str(field.annotation) or name in PATHS_OR_NAMES
        if "Literal" in kind or "dict" in kind or not ("pathlib" in kind or "str" in kind) or name == "task":
            continue
        options = read_config(cls, None, [], needed | {name: ["~/x"] if "tuple" in kind else "~/x"})
        found = getattr(options, name)
        assert str(found[0] if "tuple" in kind else found) == ("/home/me/x" if is_path else "~/x"), name


def test_a_network_to_score_with_may_lie_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = config_module.SubjectEvalOptions(backbone=("dino=~/x", "clip=a~b"))
    assert options.named_backbones == {"dino": "/home/me/x", "clip": "a~b"}


def test_the_home_folder_may_begin_the_paths_of_recipes_and_settings(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = recipe("subject: ~/photos\noutput: ~/runs/x\n")
    read_back = read_config(DreamBoothConfig, path, ["base=~/model.safetensors", "data_root=~/data"], {})
    assert (read_back.subject, read_back.output) == ("/home/me/photos", Path("/home/me/runs/x"))
    assert (read_back.base, read_back.data_root) == ("/home/me/model.safetensors", Path("/home/me/data"))


def test_names_may_have_commas_between_them():
    assert config_module.TableOptions(rows="method, seed,", columns=["dino"]).model_dump(include={"rows", "columns"}) == {
        "rows": ("method", "seed"),
        "columns": ("dino",),
    }


def test_how_images_are_drawn_is_decided_once():
    """Where the samplers are; what the options say agrees."""
    subject, control = config_module.SubjectEvalOptions(), config_module.ControlEvalOptions()
    assert subject.steps == DreamBoothConfig(subject="dog").class_sampling_steps == PAPER_SAMPLING["steps"]
    assert (control.steps, control.guidance_scale) == (S2I_SAMPLING["steps"], S2I_SAMPLING["guidance_scale"])
    told = {name: field.description for name, field in config_module.GenerateOptions.model_fields.items()}
    for name in ("steps", "guidance_scale"):
        assert f"[default: {PAPER_SAMPLING[name]:g}" in told[name]
        assert re.search(rf"with control {S2I_SAMPLING[name]:g}\b", told[name])


FRAGMENTS = st.sampled_from(
    [
        *DreamBoothConfig.model_fields,
        *(": ", "\n", "- ", "{", "}", "[", "]", "&a ", "*a", "? ", "|\n ", "!!str ", "'", '"', "\t", "#", "---\n"),
        *(".nan", "1e-3", "true", "~", "<<: ", "provenance", "0o7", "2020-01-01", "é", "\x85"),
    ]
)


def allowing_mistakes(recipe: Path | None, settings_: list[str]) -> DreamBoothConfig | None:
    """The configuration, or None where a UserError says, in at least one sentence, what is wrong."""
    try:
        return read_config(DreamBoothConfig, recipe, settings_, {"subject": "dog"})
    except UserError as error:
        if not error.problems or not all(error.problems):
            raise
        return None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), st.lists(FRAGMENTS, max_size=12).map("".join)))
def test_no_text_raises_anything_but_a_user_error(tmp_path, text):
    path = tmp_path / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config = allowing_mistakes(path, [])
    assert config is None or config.subject == "dog"


@settings(max_examples=100, deadline=None)
@given(settings_=st.lists(st.text(max_size=20), max_size=3))
def test_no_setting_raises_anything_but_a_user_error(settings_):
    allowing_mistakes(None, settings_)
