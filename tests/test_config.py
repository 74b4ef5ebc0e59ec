"""GETAConfig refuses nonsense, says the way out, and survives every form that it is written in."""

import json
import re

import pytest
from transformers import HfArgumentParser

from hf_geta import GETAConfig
from hf_geta.config import WIDTHS

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": (8, 4)}, r"weight_bits=\(8, 4\): the lower bound comes first; write weight_bits=\(4, 8\)"),
        ({"activation_bits": (8, 4)}, r"write activation_bits=\(4, 8\)"),
        ({"weight_bits": (1, 8)}, "from 2 to 16 bits"),
        ({"activation_bits": (4, 17), "initial_bits": 16}, "from 2 to 16 bits"),
        ({"weight_bits": (2.5, 4)}, "two whole numbers"),
        ({"weight_bits": (4,)}, "two whole numbers"),
        ({"weight_bits": (2, 8, 4)}, "every allowed width once, in ascending order"),
        ({"weight_bits": "48"}, "two whole numbers"),
        ({"weight_bits": 8}, "two whole numbers"),
        ({"weight_bits": None, "activation_bits": (4, 8)}, "without weight_bits"),
        ({"weight_bits": None, "group_sparsity": 0}, "compress nothing"),
        ({"target_bops": 1.5}, "target_bops=1.5: a share of the dense model's"),
        ({"target_bops": 0.1, "target_size": "4MB"}, "write one of them"),
        ({"target_size": "four"}, "target_size='four': write bytes, such as '4MB'"),
        ({"saliency_weights": (1, 1, 1)}, "write saliency='mix'"),
        ({"saliency": "mix", "saliency_weights": (1, 1)}, "write three numbers"),
        ({"saliency": "mix", "saliency_weights": ("a", 1, 1)}, "'a', 1, 1.: write three numbers"),
        ({"saliency": "mix", "saliency_weights": 5}, "saliency_weights=5: write three numbers"),
        ({"distillation_weight": 2}, "distillation_weight=2"),
        ({"distillation_weight": "a"}, "distillation_weight='a': write a number"),
        ({"distillation_temperature": None}, "distillation_temperature=None: write a number"),
        ({"quantizer_learning_rate": "1e-3"}, "quantizer_learning_rate='1e-3': write a number"),
        ({"warmup_steps": True}, "warmup_steps=True: write a number"),
        ({"pruning_periods": "3"}, "pruning_periods='3': write a whole number"),
        ({"min_groups": True}, "min_groups=True: write a whole number"),
        ({"quantize_embeddings": True}, "quantize_embeddings=True: write one width"),
        ({"weight_bits": (True, 8)}, "two whole numbers"),
        ({"uniform": "yes"}, "uniform='yes': write True or False"),
        ({"without": None}, "without=None: write a list of names"),
        ({"modules_to_not_convert": [3]}, "modules_to_not_convert=.3,.: write a list of names"),
        ({"without": "speed"}, "choose one of 'qadg', 'projection', 'joint_rule'"),
        ({"share_inputs": True, "weight_bits": None}, "share_inputs=True without weight_bits"),
        ({"without": "qadg", "uniform": True}, "groups that cannot be cut have no sizes"),
        ({"group_sparsity": "0.5"}, "group_sparsity='0.5': write a number"),
        ({"initial_bits": "16"}, "initial_bits='16': write a number"),
        ({"target_bops": "1e-3"}, "target_bops='1e-3': write a number"),
        ({"weight_bits": (4, 12), "initial_bits": 8}, "raise initial_bits to at least 12"),
        ({"initial_bits": 32}, "initial_bits=32"),
        ({"group_sparsity": 1.0}, r"a share in \[0, 1\)"),
        ({"group_sparsity": -0.1}, r"a share in \[0, 1\)"),
        ({"group_sparsity": NAN}, r"a share in \[0, 1\)"),
        ({"granularity": "block", "weight_block_size": 24}, "weight_block_size=24: choose one of 16, 32, 64, 128"),
        ({"granularity": "block", "weight_block_size": 16.0}, "weight_block_size=16.0: choose one of 16"),
        ({"granularity": "channel", "weight_block_size": 16}, "with granularity='channel', which has no blocks"),
        ({"granularity": "row"}, "choose one of 'tensor', 'channel', 'block'"),
        ({"saliency": "random"}, "choose one of 'magnitude', 'taylor', 'fisher'"),
        ({"pruning_periods": 0}, "pruning_periods=0"),
        ({"bit_reduction": 0}, "bit_reduction=0"),
        ({"joint_steps": 10.5}, "joint_steps=10.5"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"warmup_steps": NAN}, "warmup_steps=nan"),
        ({"quantizer_learning_rate": -1e-3}, "quantizer_learning_rate=-0.001"),
        ({"quantizer_learning_rate": INF}, "quantizer_learning_rate=inf: write a finite number"),
        ({"distillation_hidden_weight": INF}, "distillation_hidden_weight=inf: write a finite number"),
        ({"distillation_temperature": INF}, "distillation_temperature=inf: write a finite number"),
        ({"saliency": "mix", "saliency_weights": (NAN, 1, 1)}, "nan, 1, 1.: write three numbers, finite"),
        ({"saliency": "mix", "saliency_weights": (1, 1, INF)}, "1, 1, inf.: write three numbers, finite"),
    ],
)
def test_nonsense_is_refused_with_its_value_and_the_way_out(values, message):
    with pytest.raises(ValueError, match=message):
        GETAConfig(**values)


@pytest.mark.parametrize(("name", "hint"), [("group_sparsty", "; did you mean group_sparsity?"), (5, ".")])
def test_an_unknown_field_is_refused_with_the_nearest_and_the_known_ones(name, hint):
    with pytest.raises(ValueError, match=re.escape(f"unknown field of GETAConfig: {name}{hint} Known are: activation")):
        GETAConfig.from_dict({name: 0.5})


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    text = "{quantizer_learning_rate: 1e-3, saliency: mix, saliency_weights: [1e-1, 1.5e0, 1]}"
    for file in (text, f"geta: {text}"):
        (tmp_path / "run.yaml").write_text(file)
        config = GETAConfig.from_file(tmp_path / "run.yaml")
        assert (config.quantizer_learning_rate, config.saliency_weights) == (1e-3, (0.1, 1.5, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "it holds no keys"),
        ("geta: 5", "no section geta:"),
        ("geta: [1]", "no section geta:"),
        ("a: b: c", "is no YAML file of a run: mapping values"),
    ],
)
def test_what_is_no_file_of_a_run_is_refused(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.yaml .*{message}"):
        GETAConfig.from_file(tmp_path / "run.yaml")


CONFIG = GETAConfig(group_sparsity=0.3, weight_bits=[2, 6], activation_bits=(4, 8), modules_to_not_convert=["head"])


def test_every_form_gives_the_same_config(tmp_path):
    CONFIG.save(tmp_path / "config.json")
    section = "learning_rate: 0.1\ngeta: " + json.dumps(CONFIG.to_dict())
    (tmp_path / "run.yaml").write_text(section)
    assert GETAConfig.from_file(tmp_path / "config.json") == CONFIG
    assert GETAConfig.from_file(tmp_path / "run.yaml") == CONFIG
    assert GETAConfig.from_dict(CONFIG.to_dict()) == CONFIG
    for nothing in ("# nothing\n", "geta:\n"):
        (tmp_path / "empty.yaml").write_text(nothing)
        assert GETAConfig.from_file(tmp_path / "empty.yaml") == GETAConfig()
    flags = "--group_sparsity 0.3 --weight_bits 2 6 --activation_bits 4 8 --modules_to_not_convert head"
    (parsed,) = HfArgumentParser(GETAConfig).parse_args_into_dataclasses(flags.split())
    assert parsed == CONFIG


@pytest.mark.parametrize("text", ["none", "None", "null"])
@pytest.mark.parametrize("name", [*WIDTHS, "granularity", "target_bops", "target_size"])
def test_what_may_be_absent_is_none_in_a_file_and_on_a_command_line(name, text, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{name}: {text}")
    assert getattr(GETAConfig.from_file(tmp_path / "run.yaml"), name) is None
    (parsed,) = HfArgumentParser(GETAConfig).parse_args_into_dataclasses([f"--{name}", text])
    assert getattr(parsed, name) is None


def test_a_flag_lifts_the_share_or_the_budget_of_a_file():
    flags = "--group_sparsity none --target_bops none --target_size 4MB"
    (parsed,) = HfArgumentParser(GETAConfig).parse_args_into_dataclasses(flags.split())
    assert parsed == GETAConfig(target_size="4MB")
    with pytest.raises(SystemExit):
        HfArgumentParser(GETAConfig).parse_args_into_dataclasses(["--target_bops", "4MB"])


def test_a_config_cannot_change():
    with pytest.raises(AttributeError):
        CONFIG.group_sparsity = 0.9
    assert CONFIG.weight_bits == (2, 6)


def test_a_range_allows_every_whole_width_in_it_and_a_set_only_its_own():
    assert GETAConfig(weight_bits=(3, 6)).allowed_bits("weight_bits") == (3, 4, 5, 6)
    assert GETAConfig(weight_bits=(2, 4, 8)).allowed_bits("weight_bits") == (2, 4, 8)
    assert GETAConfig(weight_bits=(4, 8), discrete_bits=True).allowed_bits("weight_bits") == (4, 8)
    assert GETAConfig(weight_bits=(4, 4), discrete_bits=True).allowed_bits("weight_bits") == (4,)
    assert GETAConfig().allowed_bits("activation_bits") is None


@pytest.mark.parametrize(
    ("text", "size"), [("4MB", 4_000_000), ("1.5 kB", 1500), ("512KiB", 524_288), ("2GiB", 2**31), (4000000, 4_000_000)]
)
def test_a_size_is_read_in_bytes(text, size):
    assert GETAConfig(target_size=text).target_size_bytes == size


def test_without_a_budget_half_of_the_groups_go_and_with_one_the_price_decides():
    assert GETAConfig().group_sparsity == 0.5
    assert GETAConfig(target_bops=0.05).group_sparsity is None
