"""`config_overrides` of a run: fields of its model's config with other values than the model's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_geta.checkpoint.models import BUILD_ERRORS, first_line, skeleton_of
from hf_geta.config import with_numbers
from hf_geta.config_checks import refuse_unknown

# What the data, other settings or the weights say.
SAID_ELSEWHERE = {"architectures", "dtype", "id2label", "label2id", "model_type", "quantization_config"}


def read_overrides(overrides: Any) -> dict[str, Any]:
    """The fields that a file names in a mapping, or a flag in JSON.

    Raises:
        ValueError: for what is neither.
    """
    if isinstance(overrides, str):
        try:
            overrides = json.loads(overrides)
        except ValueError as error:
            raise ValueError(f"config_overrides={overrides!r} is no JSON: {first_line(error)}.") from error
    if not isinstance(overrides, Mapping | None):
        raise ValueError(f"config_overrides={overrides!r}: write fields of the model's config and their values.")
    return with_numbers(dict(overrides or {}))


def override(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """The config with other values in some fields, as `from_pretrained(name, **overrides)` has it.

    Raises:
        ValueError: for a field that it does not have, or a value that it does not take.
    """
    if not overrides:
        return config
    known = sorted(set(config.to_dict()) - SAID_ELSEWHERE)
    refuse_unknown(f"field of {config.model_type} in config_overrides", overrides, known)
    try:
        return type(config).from_dict(config.to_dict(), **overrides)
    except (*BUILD_ERRORS, StrictDataclassError) as error:
        raise ValueError(f"config_overrides: {config.model_type} does not take it: {first_line(error)}") from error


def refuse_other_weights(config: PreTrainedConfig, overrides: Mapping[str, Any], class_name: str, source: str) -> None:
    """Refuse overrides after which a pretrained model would have other tensors: those would start at random.

    Args:
        class_name: the class or Auto class that loads it.
        source: what errors call it.

    Raises:
        ValueError: as `override`, and for such fields.
    """
    if not overrides:
        return
    own, asked = (
        {name: tensor.shape for name, tensor in skeleton_of(one, class_name, source).state_dict().items()}
        for one in (config, override(config, overrides))
    )
    if changed := sorted(name for name in own.keys() | asked.keys() if own.get(name) != asked.get(name)):
        raise ValueError(
            f"config_overrides change which weights {source} has ({changed[0]} and {len(changed) - 1} more): those "
            "would start at random. With pretrained weights override what gives no tensor its size, such as dropout."
        )
