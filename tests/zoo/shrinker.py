"""Shrinks a config and its sub-configs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.names import (
    EXPERT_SIZES,
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    HIDDEN_SIZES,
    INNER_SIZES,
    IS_EXPERT,
    IS_HEADS,
    IS_INNER,
    IS_LAYERS,
    IS_POSITIONS,
    IS_TOKEN,
    IS_WIDTH,
    KEPT,
    KEY_VALUE_HEADS,
    LAYERS,
    MROPE,
    SMALL,
)
from tests.zoo.reading import BASE_FIELDS, explicit_values, is_widths, len_of_layers, pick_layers, picked_lists, read


class Shrinker:
    """Shrinks a config and its sub-configs; remembers which width became which."""

    def __init__(self, special: Mapping[str, Any]) -> None:
        self.widths: dict[int, int] = {}
        self.inner: dict[int, int] = {}
        self.experts: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        self.vocabularies: dict[int, int] = {}
        self.keep = set(special.get("keep", ()))

    def shrink(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The constructor's values of a smaller config."""
        given = explicit_values(config)
        values: dict[str, Any] = {}
        nested = {name: value for name, value in given.items() if isinstance(value, PreTrainedConfig)}
        for name in sorted(nested, key=lambda name: "text" not in name):
            values[name] = {**self.shrink(nested[name]), "model_type": nested[name].model_type}
        nested_ids = {id(value) for value in nested.values()}
        given = {name: value for name, value in given.items() if id(value) not in nested_ids}
        self._note_hidden(config, given)
        for name, value in given.items():
            if is_widths(name, value) and name != "depths" and name not in self.keep and not IS_HEADS.search(name):
                self._widths(value, config)
        layers, picked = pick_layers(config, given)
        for name, value in given.items():
            values[name] = self._value(name, value, config, layers, picked)
        fields = {field.name for field in dataclasses.fields(config)}
        if "pad_token_id" in fields and read(config, "pad_token_id") is None:
            values["pad_token_id"] = 0
        if read(config, "is_encoder_decoder") and values.get("decoder_start_token_id") is None:
            values["decoder_start_token_id"] = 0
        if "vocab_size" in fields and read(config, "vocab_size") is None:
            values["vocab_size"] = 99
        if "head_dim" in fields and read(config, "head_dim") is None and "num_attention_heads" in fields:
            values["head_dim"] = HEAD_SIZE
        values.update(picked_lists(config, layers, picked))
        values.pop("_out_features", None)
        values.pop("_out_indices", None)
        if (out := given.get("_out_indices")) is not None:
            count = min(len(out), len(picked))
            by_layer = layers > 2 and count > 0
            values["out_indices"] = list(range(len(picked) + 1 - count, len(picked) + 1)) if by_layer else list(out)
        if layers > 2 and values.get("backbone_out_indices"):
            values["backbone_out_indices"] = list(range(len(picked)))[-len(given["backbone_out_indices"]) :]
        self._agree(values)
        if config.model_type.startswith(MROPE) and "rope_parameters" in {
            field.name for field in dataclasses.fields(config)
        }:
            self._add_sections(values, config)
        return {name: value for name, value in values.items() if name not in BASE_FIELDS}

    def _agree(self, values: dict[str, Any]) -> None:
        """A vision tower that projects itself ends at the text's width."""
        text, vision = values.get("text_config"), values.get("vision_config")
        if (
            isinstance(text, dict)
            and isinstance(vision, dict)
            and "hidden_size" in text
            and "out_hidden_size" in vision
        ):
            vision["out_hidden_size"] = text["hidden_size"]

    def _note_hidden(self, config: PreTrainedConfig, given: Mapping[str, Any]) -> None:
        head_lists = [
            value for name, value in given.items() if IS_HEADS.search(name) and isinstance(value, (list, tuple))
        ]
        for name in HIDDEN:
            value = given.get(name)
            if type(value) is not int or value in self.widths or value <= 16:
                continue
            if head_lists and isinstance(head_lists[0][0], int):  # a width that doubles from stage to stage
                self.widths[value] = HEAD_SIZE * head_lists[0][0]
            else:
                used = set(self.widths.values())
                self.widths[value] = next((size for size in HIDDEN_SIZES if size not in used), 32)

    def _value(self, name: str, value: Any, config: PreTrainedConfig, layers: int, picked: list[int]) -> Any:
        if name in self.keep or isinstance(value, (bool, str, float)) or value is None:
            return value
        if IS_TOKEN.search(name):
            return self._token(name, value)
        if isinstance(value, int):
            return self._int(name, value, config, picked)
        if isinstance(value, (list, tuple)) and value:
            return self._list(name, value, config, layers, picked)
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            return self._rope(value, config)
        return value

    def _token(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._token(name, one) for one in value]
        if not isinstance(value, int) or value < 3:
            return value
        return self.tokens.setdefault(value, 3 + len(self.tokens))

    def _int(self, name: str, value: int, config: PreTrainedConfig, picked: list[int]) -> int:
        if name in LAYERS and picked and value == len_of_layers(config):
            return len(picked)
        if name == "window_size" and hasattr(config, "spatial_merge_size"):  # in pixels
            return 16 * config.spatial_merge_size
        if name in SMALL:
            return min(value, SMALL[name])
        if re.search(r"vocab_?size|n_vocab|src_vocab|tgt_vocab|num_embeddings", name) and value > 100:
            return self.vocabularies.setdefault(value, 99 + 2 * len(self.vocabularies))
        if IS_LAYERS.search(name) or name in LAYERS:
            return min(value, 2)
        if name in KEY_VALUE_HEADS or name.endswith(("key_value_heads", "kv_heads")):
            return self._key_value_heads(value, config)
        if IS_HEADS.search(name) or name in HEADS:
            return self._heads(value, config)
        if name in (
            "head_dim",
            "d_kv",
            "kv_channels",
            "attention_head_dim",
            "attention_head_size",
            "d_head",
            "dim_head",
            "swa_head_dim",
        ):
            return self._head_size(value, config)
        if name in (
            "image_size",
            "img_size",
            "input_resolution",
            "resolution",
            "pretrain_image_size",
            "visual_prompt_size",
            "spec_size",
        ):
            return self._image_size(value, config)
        if name == "patch_size":
            return value if value <= 4 else 8
        if IS_EXPERT.search(name):
            return pooled(self.experts, value, EXPERT_SIZES)
        if value in self.widths and (IS_WIDTH.search(name) or name in HIDDEN):
            return self.widths[value]
        if IS_INNER.search(name) and value > 16:
            return pooled(self.inner, value, INNER_SIZES)
        if IS_POSITIONS.search(name) and value > 64:
            return 64
        if KEPT.search(name):
            return value
        if IS_WIDTH.search(name) or value > 256:
            return self._width(value)
        return value

    def _width(self, value: int) -> int:
        if value <= 16:
            return value
        if value not in self.widths:
            multiple = next((k for k in (2, 3, 4) for width in self.widths if value == k * width), None)
            if multiple:
                return multiple * self.widths[value // multiple]
            self.widths[value] = 16 if value < 256 else max(16, 8 * round(value / 128))
        return self.widths[value]

    def _hidden(self, config: PreTrainedConfig) -> tuple[int, int] | None:
        values = explicit_values(config)
        found = [value for name in HIDDEN if type(value := values.get(name)) is int and value in self.widths]
        heads = next((one for name in HEADS if type(one := read(config, name)) is int), None)
        if heads and len(found) > 1:  # of several widths, the one that heads of a usual size make up
            found.sort(key=lambda width: (width % heads != 0, not 32 <= width / heads <= 128))
        return (found[0], self.widths[found[0]]) if found else None

    def _heads(self, value: int, config: PreTrainedConfig) -> int:
        hidden = self._hidden(config)
        if value == 1 or hidden is None:
            return min(value, 4)
        most = max(hidden[1] // HEAD_SIZE, 1)
        return most if value >= most else max(heads for heads in range(1, value + 1) if most % heads == 0)

    def _key_value_heads(self, value: int, config: PreTrainedConfig) -> int:
        original = next((v for name in HEADS if type(v := read(config, name)) is int), value)
        heads = self._heads(original, config)
        if value == original or value == 1:
            return heads if value == original else 1
        return max([d for d in range(1, heads) if heads % d == 0 and d <= max(2, heads // 2)], default=1)

    def _head_size(self, value: int, config: PreTrainedConfig) -> int:
        hidden = self._hidden(config)
        heads = next((v for name in HEADS if type(v := read(config, name)) is int), None)
        is_quotient = hidden is None or heads is None or heads * value == hidden[0]
        return HEAD_SIZE if is_quotient else 2 * HEAD_SIZE

    def _image_size(self, value: int, config: PreTrainedConfig) -> int:
        patch = read(config, "patch_size")
        if isinstance(patch, int):
            return 32 if patch > 4 else 64 if value >= 64 else value
        return min(value, 64)

    def _list(self, name: str, value: Sequence[Any], config: PreTrainedConfig, layers: int, picked: list[int]) -> Any:
        if len(value) == layers and picked and layers > 2:
            value = [value[index] for index in picked]
        if all(isinstance(one, (list, tuple)) for one in value):
            return [self._list(name, one, config, -1, []) if one else one for one in value]
        if not all(type(one) is int for one in value):
            return value
        if name in ("image_size", "img_size"):
            return [self._image_size(one, config) for one in value]
        if (
            re.search(r"(depths|blocks_per_stage|layers|block_repeats|num_blocks|block_sizes|numb_of_layers)$", name)
            and "no_rope" not in name
        ):
            return [min(one, 2) for one in value]
        if re.search(r"(indices|_ind|indexes|_layers|_idxs|_ids|layer_ids|attention_blocks)$", name) or KEPT.search(
            name
        ):
            return self._indices(name, value, layers, picked)
        if IS_HEADS.search(name):
            return value
        if IS_WIDTH.search(name) or name in HIDDEN:
            return self._widths(value, config)
        return value

    def _indices(self, name: str, value: Sequence[int], layers: int, picked: list[int]) -> list[int]:
        """Numbers of layers, in proportion to how many layers are left."""
        if KEPT.search(name) or layers <= 2 or not picked or min(value) < 0 or max(value) > layers:
            return list(value)
        return sorted({min(len(picked) - 1, one * len(picked) // layers) for one in value})

    def _widths(self, value: Sequence[int], config: PreTrainedConfig) -> list[int]:
        """Widths of stages: in proportion where they have heads, else each on its own."""
        heads = next((h for n in HEADS if isinstance(h := read(config, n), (list, tuple))), None)
        positive = [one for one in value if one > 8]
        if heads and isinstance(heads[0], int) and positive:
            tiny = [max(8, one * HEAD_SIZE * heads[0] // min(positive)) if one > 8 else one for one in value]
            for one, size in zip(value, tiny):
                self.widths.setdefault(one, size)
            return tiny
        return [one if one <= 8 else self.widths.setdefault(one, 8 * max(1, round(one / 48))) for one in value]

    def _add_sections(self, values: dict[str, Any], config: PreTrainedConfig) -> None:
        """Rotary sections of time, height and width, which the code would else take from its published sizes."""
        rope = values.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}
        if any(isinstance(value, dict) for value in rope.values()):
            return
        share = rope.get(
            "partial_rotary_factor", values.get("partial_rotary_factor") or read(config, "partial_rotary_factor") or 1.0
        )
        if share < 1:
            values["head_dim"] = 2 * HEAD_SIZE
            rope["partial_rotary_factor"] = 0.5
        pairs = int(values.get("head_dim", HEAD_SIZE) * min(share, rope.get("partial_rotary_factor", 1.0))) // 2
        values["rope_parameters"] = {**rope, "mrope_section": [pairs - 2 * (pairs // 4), pairs // 4, pairs // 4]}

    def _rope(self, value: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
        rope = {name: self._rope(one, config) if isinstance(one, dict) else one for name, one in value.items()}
        for name in ("mrope_section", "xdrope_section"):
            if name in rope:
                rope[name] = [2, 1, 1] if name == "mrope_section" else [1, 1, 1, 1]
        for name in ("short_factor", "long_factor"):
            if name in rope:
                rope[name] = [1.0] * (HEAD_SIZE // 2)
        return rope


def pooled(known: dict[int, int], value: int, sizes: Sequence[int]) -> int:
    if value <= 16:
        return value
    return known.setdefault(value, sizes[len(known) % len(sizes)])
