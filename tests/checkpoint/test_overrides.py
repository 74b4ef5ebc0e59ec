"""Laws of a run's `config_overrides`."""

import pytest
from transformers import BertConfig, CLIPConfig

from hf_geta.checkpoint.overrides import override, read_overrides, refuse_other_weights

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


@pytest.mark.parametrize("given", [{"layer_norm_eps": "1e-5"}, '{"layer_norm_eps": 1e-5}'])
def test_a_file_and_a_flag_say_the_same(given):
    """YAML leaves 1e-5 as text."""
    assert override(BertConfig(), read_overrides(given)).layer_norm_eps == 1e-5
    config = BertConfig()
    assert override(config, read_overrides(None)) is config


def test_fields_of_an_inner_config_are_changed_in_it():
    config = CLIPConfig(text_config=SIZES)
    changed = override(config, {"text_config": {"attention_dropout": 0.5}}).text_config
    assert (changed.attention_dropout, changed.hidden_size) == (0.5, 8)
    assert config.text_config.attention_dropout == 0.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{hidden", "is no JSON"),
        ([1], "write fields of the model's config"),
        ({"hiden_size": 3}, "unknown field of bert in config_overrides: hiden_size; did you mean hidden_size"),
        ({"id2label": {0: "a"}}, "unknown field of bert in config_overrides: id2label"),
        ({"hidden_size": "large"}, "bert does not take it"),
    ],
)
def test_what_a_config_does_not_take_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        override(BertConfig(), read_overrides(given))


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 2}, {"intermediate_size": 12}, {"vocab_size": 30}])
def test_what_changes_pretrained_tensors_is_refused(overrides):
    config = BertConfig(**SIZES)
    refuse_other_weights(config, {"hidden_dropout_prob": 0.0}, "AutoModelForMaskedLM", "here")
    with pytest.raises(ValueError, match=r"change which weights here has \(.* more\): those would start at random"):
        refuse_other_weights(config, overrides, "AutoModelForMaskedLM", "here")
