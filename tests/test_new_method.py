"""A method is added by one entry in METHODS: everything else asks that entry."""

from types import SimpleNamespace

import pytest
import torch
from peft import MissConfig
from peft.tuners.miss import MissLayer

from etherdiff.adapters.analysis import adapter_drift, distance_problem
from etherdiff.adapters.io import load_adapter, lora_factors, merge_adapter, read_adapter, save_adapter
from etherdiff.adapters.layers import AdapterLayer, from_identity
from etherdiff.adapters.methods import METHODS, Method, MethodOptions, Style, add_adapter, label_styles, trainable_parameters
from etherdiff.config import InspectOptions
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.report import page
from etherdiff.results import figures
from etherdiff.system.errors import UserError
from etherdiff.use.inspection import inspect_base


class MadeUpLayer(AdapterLayer):
    """Miss's updates, said to be transformations for the sake of the test."""

    why_no_lora = "it was made up"

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        return from_identity(torch.zeros(4, 4)), None


@pytest.fixture(autouse=True)
def entry(monkeypatch) -> Method:
    made_up = Method(
        summary="made up",
        learning_rate=1e-3,
        s2i_learning_rate=1e-4,
        config=lambda o: MissConfig(r=o.rank, target_modules=list(o.targets)),
        layer=MadeUpLayer,
        style=Style(2.5, "orange", "x", "dashed"),
        options=frozenset({"rank"}),
        defaults=MethodOptions(rank=2),
        bound="It goes nowhere.",
    )
    monkeypatch.setitem(METHODS, "made-up", made_up)
    return made_up


@pytest.fixture
def model():
    adapted = add_adapter(load_base(find_base("tiny")).unet, "made-up", MethodOptions())
    with torch.no_grad():
        for parameter in trainable_parameters(adapted).values():
            parameter.normal_()
    return adapted


def test_it_is_inspected():
    options = InspectOptions(base="tiny").model_copy(update={"method": ("made-up",)})  # config.py does not know its name
    row = inspect_base(options)["methods"]["made-up"]
    adapted = add_adapter(load_base(find_base("tiny")).unet, "made-up", MethodOptions())
    assert row["trainable_parameters"] == sum(parameter.numel() for parameter in trainable_parameters(adapted).values())
    assert row["default_learning_rate"] == 1e-3
    assert row["lora_exact"] is False


def test_its_adapter_is_saved_and_read_by_its_name(model, tmp_path):
    save_adapter(model, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter")
    trained = trainable_parameters(model).values()
    assert saved.method == "made-up"
    assert saved.trained_parameters() == sum(parameter.numel() for parameter in trained)
    again = load_adapter(load_base(find_base("tiny")).unet, tmp_path / "adapter")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_it_cannot_do_is_said(model, tmp_path):
    with pytest.raises(UserError, match="exact as a LoRA, because it was made up"):
        lora_factors(model)
    assert "no transformation that could be random" in str(distance_problem(model, 1.0))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="made-up has no scale"):
        load_adapter(load_base(find_base("tiny")).unet, tmp_path / "adapter", scale=0.5)


def test_its_drift_is_what_its_layer_says(model):
    before = {name: layer.get_base_layer().weight.clone() for name, layer in miss_layers(model).items()}
    found = adapter_drift(model)
    after = merge_adapter(model).state_dict()
    assert found.keys() == before.keys()
    for name, drift in found.items():
        assert drift.weight == pytest.approx(float((after[f"{name}.weight"] - before[name]).norm()), rel=1e-4)
        assert (drift.input_side, drift.output_side) == (2.0, None)


def miss_layers(model) -> dict[str, MissLayer]:
    return {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, MissLayer)}


def test_its_bound_stands_in_the_report(model):
    run = SimpleNamespace(adapters=["adapter"], config=SimpleNamespace(method="made-up"))
    contents = SimpleNamespace(drift=adapter_drift(model), why_no_drift="", run=run)
    assert page._drift(contents)["note"] == "It goes nowhere."


def test_its_runs_stand_in_tables_and_figures_in_its_place_and_style(entry):
    labels = list(label_styles())
    assert labels[labels.index("lora") + 1] == "made-up"
    assert figures._styles([("lora",), ("made-up",)])[("made-up",)] == entry.style
