"""Tiny configs of any model type: the defaults of its config class, shrunk by what the names of the fields mean.

Equal widths stay equal and lists keep their lengths, over all sub-configs together, since one part's output width is
another's input width. Widths of different meaning get different sizes, so that a wrong tie between axes shows. Where
names are not enough, `special.py` has values by model type.
"""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests.zoo.reading import explicit_values
from tests.zoo.shrinker import Shrinker
from tests.zoo.special import CONFIGS


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a model type; `changes` are fields of it ("text_config__hidden_size" for nested ones)."""
    special = CONFIGS.get(model_type, {})
    config = default_config(model_type, **special.get("start", {}))
    values = explicit_values(config) if special.get("whole") else Shrinker(special).shrink(config)
    for path, value in {**special.get("set", {}), **changes}.items():
        *outer, name = path.split("__")
        owner = values
        for step in outer:
            owner = owner.setdefault(step, {})
        owner[name] = value
    return type(config)(**values)


def default_config(model_type: str, **values: Any) -> PreTrainedConfig:
    """The config class's defaults, with backbones of transformers instead of those of timm or of a hub."""
    config_class: Any = CONFIG_MAPPING[model_type]
    config: Any = config_class(**values)
    backbone = getattr(config, "backbone_config", None)
    if getattr(backbone, "model_type", None) == "timm_backbone" or getattr(config, "use_timm_backbone", False):
        out: Any = {"out_indices": [1, 2, 3, 4]}
        config = config_class(
            **{"use_timm_backbone": False, "backbone": None, **values}, backbone_config=CONFIG_MAPPING["resnet"](**out)
        )
    return config
