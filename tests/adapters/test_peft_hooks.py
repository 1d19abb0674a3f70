"""The parts of PEFT that etherdiff builds on and PEFT does not promise to keep (2.4 of the design notes).

When one of these fails after an upgrade, PEFT changed that hook: see what etherdiff/adapters/tuner.py makes of it.
"""

import importlib
import inspect
from functools import partial

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import nn

from etherdiff.adapters.baselines import MagnitudeConfig, MagnitudeLayer, MagnitudeModel, NaiveConfig, NaiveLayer, NaiveModel
from etherdiff.adapters.ether import EtherConfig, EtherLayer, EtherModel
from etherdiff.adapters.tuner import UpdateLayer, UpdateTuner

OURS = [
    (EtherConfig, EtherModel, EtherLayer),
    (NaiveConfig, NaiveModel, NaiveLayer),
    (MagnitudeConfig, MagnitudeModel, MagnitudeLayer),
]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("peft.config", "PeftConfig"),
        ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
        ("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING"),
        ("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"),
        ("peft.tuners.tuners_utils", "BaseTuner"),
        ("peft.tuners.tuners_utils", "BaseTunerLayer"),
        ("peft.tuners.tuners_utils", "check_adapters_to_merge"),
        ("peft.utils", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"),
    ],
)
def test_what_we_import_is_there(module, name):
    assert hasattr(importlib.import_module(module), name), f"PEFT moved {module}.{name}"


@pytest.mark.parametrize(("config", "tuner", "layer"), OURS)
def test_the_mappings_peft_reads_hold_our_types(config, tuner, layer):
    kind = config(target_modules=["x"]).peft_type
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is config
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is tuner
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == tuner.prefix
    # PEFT looks a saved adapter's type up by the plain string in adapter_config.json
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind.value] is config
    assert all(name.startswith(tuner.prefix) for name in layer.adapter_layer_names)


def test_no_type_or_prefix_of_ours_is_one_of_pefts():
    ours = {tuner for _, tuner, _ in OURS}
    theirs = {PEFT_TYPE_TO_PREFIX_MAPPING[k] for k, t in PEFT_TYPE_TO_TUNER_MAPPING.items() if t not in ours}
    for _, tuner, _ in OURS:
        assert tuner.prefix not in theirs, f"PEFT now uses the prefix {tuner.prefix!r} itself"


HOOKS = {
    # tuner methods that we override: PEFT calls ours with these parameters
    (BaseTuner, "_prepare_model"): ["self", "peft_config", "model"],
    (BaseTuner, "_create_and_replace"): [
        "self",
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "parameter_name",
    ],
    (BaseTuner, "merge_adapter"): ["self", "adapter_names", "safe_merge"],
    # tuner methods that we call
    (BaseTuner, "_check_target_module_exists"): ["peft_config", "key"],
    (BaseTuner, "_check_merge_allowed"): ["self"],
    (BaseTuner, "_replace_module"): ["self", "parent", "child_name", "new_module", "child"],
    # layer methods that we override, or that are called on our layers
    (BaseTunerLayer, "merge"): ["self", "safe_merge", "adapter_names"],
    (BaseTunerLayer, "unmerge"): ["self"],
    (BaseTunerLayer, "delete_adapter"): ["self", "adapter_name"],
    (BaseTunerLayer, "set_adapter"): ["self", "adapter_names", "inference_mode"],
    (BaseTunerLayer, "enable_adapters"): ["self", "enabled"],
    (BaseTunerLayer, "supports_lora_conversion"): ["self", "adapter_name"],
    (BaseTunerLayer, "get_base_layer"): ["self"],
}


@pytest.mark.parametrize(("owner", "name"), HOOKS, ids=lambda value: getattr(value, "__name__", value))
def test_hooks_take_what_they_took(owner, name):
    hook = getattr(owner, name, None)
    assert hook is not None, f"PEFT has no {owner.__name__}.{name} any more; etherdiff/adapters/tuner.py needs it"
    parameters = list(inspect.signature(hook).parameters)
    assert parameters == HOOKS[owner, name], f"PEFT changed {owner.__name__}.{name} to take {parameters}"


@pytest.mark.parametrize("name", ["merged", "disable_adapters", "active_adapters", "weight", "bias"])
def test_properties_of_layers(name):
    assert isinstance(getattr(BaseTunerLayer, name, None), property), f"PEFT's BaseTunerLayer.{name} is no property"


def test_overrides_still_override_something():
    for ours, theirs in ((UpdateTuner, BaseTuner), (UpdateLayer, BaseTunerLayer)):
        called_by_peft = (
            {"_prepare_model", "_create_and_replace", "merge_adapter"}
            if ours is UpdateTuner
            else {
                "merge",
                "unmerge",
                "delete_adapter",
                "supports_lora_conversion",
            }
        )
        for name in called_by_peft:
            assert name in vars(ours), name
            assert hasattr(theirs, name), f"PEFT no longer has {theirs.__name__}.{name}"


def test_the_state_our_layer_sets_is_the_state_peft_reads():
    """UpdateLayer.__init__ sets these instead of calling BaseTunerLayer's, which takes no base layer."""
    layer = EtherLayer(nn.Linear(4, 6))
    layer.set_adapter("a")
    assert layer.active_adapters == ["a"]
    assert layer.disable_adapters is False
    layer.enable_adapters(False)
    assert layer.disable_adapters is True
    assert layer.merged is False
    layer.merged_adapters.append("a")
    assert layer.merged is True
    assert layer.weight is layer.base_layer.weight
    assert layer.get_base_layer() is layer.base_layer


def test_check_adapters_to_merge_leaves_out_the_merged():
    layer = EtherLayer(nn.Linear(4, 6))
    layer.set_adapter(["a", "b"])
    check = partial(check_adapters_to_merge, layer)
    assert check(None) == ["a", "b"]
    layer.merged_adapters.append("a")
    with pytest.warns(UserWarning, match="Already following adapters were merged a"):
        assert check(None) == ["b"]


def test_diffusers_finds_the_scale_methods():
    parameters = {
        "set_scale": ["self", "adapter", "scale"],
        "scale_layer": ["self", "scale"],
        "unscale_layer": ["self", "scale"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(UpdateLayer, name)).parameters) == expected
