"""How a GETAConfig reads its values, and what it refuses: all outside their domain, with the value and the way out.

Checks raise ValueError only.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

GRANULARITIES = ("tensor", "channel", "block")
BLOCK_SIZES = (16, 32, 64, 128)
USUAL_BLOCK_SIZE = 32
SALIENCIES = ("magnitude", "taylor", "fisher", "mix")
MIXED_SALIENCIES = SALIENCIES[:3]  # what "mix" mixes, in the order of `saliency_weights`
OPTIONAL_AXES = ("query_head", "head_dim")  # kinds that are left alone unless they are asked for
PARTS = ("qadg", "projection", "joint_rule")  # parts of the method that an ablation leaves out
MIN_BITS, MAX_BITS = 2, 16
SWITCHES = ("discrete_bits", "share_inputs", "uniform")
NAMES = ("optional_axes", "without", "modules_to_not_convert")
NUMBERS = (
    "initial_bits",
    "warmup_steps",
    "projection_steps",
    "joint_steps",
    "quantizer_learning_rate",
    "distillation_weight",
    "distillation_temperature",
    "distillation_hidden_weight",
)
COUNTS = ("bit_reduction", "pruning_periods", "min_groups", "group_divisible", "calibration_batches")


def check_config(config: Any) -> None:
    """Refuse `config`, a GETAConfig, if any of its fields makes no sense, alone or beside the others."""
    _check_types(config)
    _check_numbers(config)
    _check_bits("weight_bits", config.weight_bits, config.initial_bits)
    _check_bits("activation_bits", config.activation_bits, config.initial_bits)
    if config.weight_bits is None and config.activation_bits is not None:
        raise ValueError(
            f"activation_bits={config.activation_bits} without weight_bits: a layer rounds its weight whenever it "
            "rounds its input; write weight_bits=(8, 8) or drop activation_bits."
        )
    _check_outliers(config)
    _check_embeddings(config)
    if config.weight_bits is None and not config.prunes:
        raise ValueError("weight_bits=None and group_sparsity=0 compress nothing: train with transformers.Trainer.")
    if config.share_inputs and config.weight_bits is None:
        raise ValueError("share_inputs=True without weight_bits: there is no width to share; write weight_bits=(4, 8).")
    if config.granularity is not None:
        _check_choice("granularity", config.granularity, GRANULARITIES)
    _check_block_size(config.weight_block_size, config.granularity)
    _check_choice("saliency", config.saliency, SALIENCIES)
    for kind in config.optional_axes:
        _check_choice("optional_axes", kind, OPTIONAL_AXES)
    for part in config.without:
        _check_choice("without", part, PARTS)
    if config.uniform and "qadg" in config.without:
        raise ValueError("uniform=True with without='qadg': groups that cannot be cut have no sizes; drop one of them.")
    _check_saliency_weights(config.saliency, config.saliency_weights)
    _check_budget(config)


def is_none(value: Any) -> bool:
    """Whether a value is how YAML (`none`, text to it) or a command line (`none`, one of a list) write None."""
    if isinstance(value, str):
        return value.lower() in ("none", "null")
    return isinstance(value, list) and value == [None]


if TYPE_CHECKING:
    Width = int
    Share = float
else:

    class Width:
        """The type that HfArgumentParser finds on a field that holds widths: it makes an int of a flag, or None."""

        number, in_words = int, "a whole number"

        def __new__(cls, text: str) -> float | None:
            try:
                return None if is_none(text) else cls.number(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f"{text!r}: write {cls.in_words}, or none.") from None

    class Share(Width):
        """The same for a field that holds a share: it makes a float of a flag, or None."""

        number, in_words = float, "a number"


def parse_bytes(text: str) -> int:
    """ "4MB" -> 4,000,000; "512KiB" -> 524,288; "4000000" -> 4,000,000."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kKMG]?)(i?)B)?\s*", text)
    if found is None or not float(found[1]) > 0:
        raise ValueError(f"target_size={text!r}: write bytes, such as '4MB', '512KiB' or 4000000.")
    power = " KMG".index((found[2] or " ").upper())
    return round(float(found[1]) * (1024 if found[3] else 1000) ** power)


def refuse_unknown(what: str, names: Iterable[Any], known: Sequence[str]) -> None:
    """Refuse the first name that is not `known`, with the nearest and all known ones."""
    for name in names:
        if name not in known:
            raise ValueError(
                f"unknown {what}: {name}{did_you_mean(name, known)} Known are: {', '.join(sorted(known))}."
            )


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known one that is near, if any."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_types(config: Any) -> None:
    for name in SWITCHES:
        if not isinstance(value := getattr(config, name), bool):
            raise ValueError(f"{name}={value!r}: write True or False.")
    for name in NAMES:
        value = getattr(config, name)
        if value is None and name == "modules_to_not_convert":
            continue
        if not isinstance(value, tuple) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{name}={value!r}: write a list of names.")
    for name in (*NUMBERS, "group_sparsity", "target_bops"):
        value = getattr(config, name)
        if not _is_number(value) and (value is not None or name in NUMBERS):
            raise ValueError(f"{name}={value!r}: write a number.")


def _check_numbers(config: Any) -> None:
    if config.group_sparsity is not None and not 0 <= config.group_sparsity < 1:
        raise ValueError(f"group_sparsity={config.group_sparsity}: a share in [0, 1); 0 keeps every group.")
    if not MIN_BITS <= config.initial_bits <= MAX_BITS:
        raise ValueError(f"initial_bits={config.initial_bits}: write a width from {MIN_BITS} to {MAX_BITS}.")
    for name in COUNTS:
        if not _is_whole(value := getattr(config, name)) or value < 1:
            raise ValueError(f"{name}={value!r}: write a whole number, 1 or more.")
    for name in ("warmup_steps", "projection_steps", "joint_steps"):
        value = getattr(config, name)
        if not (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
            raise ValueError(f"{name}={value}: write a share in [0, 1) or a whole number of steps.")
    for name in ("quantizer_learning_rate", "distillation_hidden_weight"):
        if not 0 <= (value := getattr(config, name)) < math.inf:
            raise ValueError(f"{name}={value}: write a finite number, 0 or more.")
    if not 0 <= config.distillation_weight <= 1:
        raise ValueError(f"distillation_weight={config.distillation_weight}: write a part of the loss, in [0, 1].")
    if not 0 < config.distillation_temperature < math.inf:
        raise ValueError(f"distillation_temperature={config.distillation_temperature}: write a finite number above 0.")


def _check_bits(name: str, bits: Any, initial_bits: float) -> None:
    if bits is None:
        return
    if not isinstance(bits, tuple) or len(bits) < 2 or not all(map(_is_whole, bits)):
        raise ValueError(
            f"{name}={bits!r}: write two whole numbers, the lower and the upper width, such as (4, 8), or all widths "
            "that are allowed, such as (2, 4, 8)."
        )
    lower, upper = bits[0], bits[-1]
    if len(bits) > 2 and list(bits) != sorted(set(bits)):
        raise ValueError(f"{name}={bits}: write every allowed width once, in ascending order.")
    if lower > upper:
        raise ValueError(f"{name}={bits}: the lower bound comes first; write {name}=({upper}, {lower}).")
    if lower < MIN_BITS or upper > MAX_BITS:
        raise ValueError(f"{name}={bits}: widths go from {MIN_BITS} to {MAX_BITS} bits, the sign included.")
    if upper > initial_bits:
        raise ValueError(
            f"{name}={bits} starts above initial_bits={initial_bits}: raise initial_bits to at least {upper}."
        )


def _check_outliers(config: Any) -> None:
    bits = config.outlier_activation_bits
    if bits is None:
        return
    if config.activation_bits is None:
        raise ValueError(
            f"outlier_activation_bits={bits} without activation_bits: no input is rounded; write activation_bits=(8, 8)"
            ", or drop it."
        )
    lower = config.activation_bits[-1] + 1
    if not _is_whole(bits) or not lower <= bits <= config.initial_bits:
        raise ValueError(
            f"outlier_activation_bits={bits!r}: write one width above activation_bits={config.activation_bits}, up to "
            f"initial_bits={config.initial_bits}; or drop it."
        )


def _check_embeddings(config: Any) -> None:
    bits = config.quantize_embeddings
    if bits is None:
        return
    if not _is_whole(bits) or not MIN_BITS <= bits <= config.initial_bits:
        raise ValueError(
            f"quantize_embeddings={bits!r}: write one width from {MIN_BITS} to initial_bits={config.initial_bits}."
        )
    if config.weight_bits is None:
        raise ValueError(
            f"quantize_embeddings={bits} without weight_bits: a run whose weights stay in float only prunes; write "
            "weight_bits, or drop quantize_embeddings."
        )


def _check_budget(config: Any) -> None:
    if config.target_bops is not None and not 0 < config.target_bops < 1:
        raise ValueError(f"target_bops={config.target_bops}: a share of the dense model's, above 0 and below 1.")
    if config.target_size is not None:
        parse_bytes(config.target_size)
        if config.target_bops is not None:
            raise ValueError(
                f"target_bops={config.target_bops} and target_size={config.target_size!r}: write one of them."
            )
    if config.has_budget and "projection" in config.without:
        raise ValueError("without='projection' leaves widths free, and no budget holds: write group_sparsity instead.")
    if config.has_budget and config.saliency != "fisher":
        raise ValueError(
            f"saliency={config.saliency!r} with a budget: groups and widths compete at one price, and only 'fisher' "
            "measures both in one unit; write saliency='fisher'."
        )


def _check_saliency_weights(saliency: str, weights: Any) -> None:
    if weights is None:
        return
    if saliency != "mix":
        raise ValueError(f"saliency_weights={weights} are parts of a mix: write saliency='mix', or drop them.")
    are_parts = isinstance(weights, tuple) and all(_is_number(weight) and 0 <= weight < math.inf for weight in weights)
    if not are_parts or len(weights) != len(MIXED_SALIENCIES) or sum(weights) <= 0:
        raise ValueError(
            f"saliency_weights={weights!r}: write three numbers, finite, 0 or more, for {', '.join(MIXED_SALIENCIES)}."
        )


def _check_block_size(size: Any, granularity: str | None) -> None:
    if not _is_whole(size) or size not in BLOCK_SIZES:
        raise ValueError(f"weight_block_size={size!r}: choose one of {', '.join(map(str, BLOCK_SIZES))}.")
    if size != USUAL_BLOCK_SIZE and granularity not in (None, "block"):
        raise ValueError(
            f"weight_block_size={size} with granularity={granularity!r}, which has no blocks: write "
            "granularity='block' or drop it."
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
