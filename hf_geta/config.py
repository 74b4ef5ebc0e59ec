"""GETAConfig: everything that one compression run needs to know, checked before any step is spent.

The same object is written in Python, read from YAML/JSON, and parsed from the command line by
`transformers.HfArgumentParser`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_geta.config_checks import (
    MAX_BITS,
    MIN_BITS,
    USUAL_BLOCK_SIZE,
    Share,
    Width,
    check_config,
    is_none,
    parse_bytes,
    refuse_unknown,
)

SECTION = "geta"  # of a file that holds more than a GETAConfig
DEFAULT_GROUP_SPARSITY = 0.5
# the fields that bound widths of quantizers
WIDTHS = ("weight_bits", "quantize_embeddings", "activation_bits", "outlier_activation_bits")


@dataclasses.dataclass(frozen=True)
class GETAConfig:
    """What to compress, how far, and when (Qu et al., CVPR 2025, arXiv 2502.16638, Algorithm 2).

    Two numbers of bits are a range `(lower, upper)`, more are a set of allowed widths, such as `(2, 4, 8)` (two as
    well, with `discrete_bits`): relaxed inside its hull while it trains, in it at the end. Every width is inside its
    range after every optimizer step past the warm-up (but in the ablation without the projection).

    The targets are either those and `group_sparsity`, or a budget (`target_bops`, `target_size`): then one price
    decides how many groups go and how many bits stay, inside the same bounds. Stage lengths follow the habit of
    `TrainingArguments.warmup_steps`: below 1 a share of the run's optimizer steps, otherwise a number of steps. What
    they leave is the cool-down.

    Raises:
        ValueError: for a value outside its domain; the message names the value and the way out.
    """

    group_sparsity: Share | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Share of all pruning groups that the run removes, in [0, 1); 0.5 if nothing is written. With a "
            "budget: the most that it may remove, by default as many as min_groups lets go."
        },
    )
    # `list` because HfArgumentParser reads lists from the command line; kept as a tuple.
    weight_bits: list[Width] | None = dataclasses.field(
        default_factory=lambda: [4, 8],
        metadata={
            "help": "Weight widths in bits: two numbers are a range, lower upper; more are the widths allowed at the "
            "end. none leaves weights in float: the run only prunes."
        },
    )
    activation_bits: list[Width] | None = dataclasses.field(
        default=None, metadata={"help": "Activation widths, likewise; none leaves activations in float."}
    )
    outlier_activation_bits: Width | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Width in bits, such as 16, of the few activations whose outliers leave activation_bits nothing "
            "for all other numbers: calibration finds them, mostly inputs of a decoder's down projections. none gives "
            "all layers activation_bits, and warns."
        },
    )
    discrete_bits: bool = dataclasses.field(
        default=False, metadata={"help": "Two numbers of bits are a set of allowed widths too, not a range."}
    )
    target_bops: Share | None = dataclasses.field(
        default=None,
        metadata={"help": "Budget: bit operations of the compressed model over those of the dense one, in (0, 1)."},
    )
    target_size: str | None = dataclasses.field(
        default=None, metadata={"help": "Budget: bytes of the weight file, such as 4MB, 512KiB or 4000000."}
    )
    granularity: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "One clip per weight 'tensor', per output 'channel', or per 'block' of inputs of one (of linear "
            "layers; elsewhere as 'channel'); the width is one per tensor. If nothing is written: 'block' for models "
            "that read or write tokens, which lose most by a coarse grid at 4 bits, 'tensor' for others."
        },
    )
    weight_block_size: int = dataclasses.field(
        default=USUAL_BLOCK_SIZE,
        metadata={
            "help": "Inputs of a block: 16, 32, 64 or 128. Smaller ones lose less at 4 bits and take more space; those "
            "of 32 have a place in every format that hf-geta export writes."
        },
    )
    share_inputs: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Layers that read the same tensor (q, k and v; gate and up) end with one width for their weights, "
            "and round it once, with one width and one scale: needed by programs that run them as one product."
        },
    )
    quantize_embeddings: Width | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Width in bits of the input and output embeddings, one step size per row, however often they are "
            "tied; none leaves them in float."
        },
    )
    initial_bits: int = dataclasses.field(
        default=16, metadata={"help": "Width of every quantizer at the start, in bits."}
    )
    bit_reduction: int = dataclasses.field(
        default=2, metadata={"help": "Bits by which the upper bound falls from one projection period to the next."}
    )
    warmup_steps: float = dataclasses.field(
        default=0.1, metadata={"help": "Length of the warm-up stage: a share (< 1) or optimizer steps."}
    )
    projection_steps: float = dataclasses.field(
        default=0.2, metadata={"help": "Length of the projection stage: a share (< 1) or optimizer steps."}
    )
    joint_steps: float = dataclasses.field(
        default=0.3, metadata={"help": "Length of the joint stage: a share (< 1) or optimizer steps."}
    )
    pruning_periods: int = dataclasses.field(
        default=10, metadata={"help": "Periods of the joint stage; each removes its part of the groups."}
    )
    saliency: str = dataclasses.field(
        default="fisher", metadata={"help": "Score of a group: 'magnitude', 'taylor', 'fisher' or 'mix'."}
    )
    saliency_weights: list[float] | None = dataclasses.field(
        default=None,
        metadata={"help": "With saliency='mix': the parts of magnitude, taylor and fisher; by default equal parts."},
    )
    min_groups: int = dataclasses.field(
        default=1, metadata={"help": "Groups that every axis keeps at least (heads, hidden units, channels)."}
    )
    group_divisible: int = dataclasses.field(
        default=1,
        metadata={
            "help": "Axes longer than this keep multiples of it, if they lose any (8, 16, 32: what hardware likes)."
        },
    )
    uniform: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "All layers keep equally many heads, hidden units or channels, so that an ordinary config states "
            "the sizes, which hf-geta export writes. What no field of the config states stays whole."
        },
    )
    optional_axes: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Kinds of axes to prune instead of their rivals: 'query_head', the queries within each key-value "
            "group, not the groups; 'head_dim', the size of a layer's heads, not the heads."
        },
    )
    quantizer_learning_rate: float = dataclasses.field(
        default=1e-3,
        metadata={
            "help": "Learning rate of the quantizers; they live in log space, so with Adam and its like it is a "
            "relative change per step. With SGD it multiplies their gradients, which are small: they hardly move then."
        },
    )
    calibration_batches: int = dataclasses.field(
        default=4, metadata={"help": "Training batches that set the activation ranges before the first step."}
    )
    modules_to_not_convert: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Modules kept in float, in place of those that stay in float if nothing is written: output "
            "embeddings and tied layers."
        },
    )

    distillation_weight: float = dataclasses.field(
        default=0.5, metadata={"help": "With a teacher_model: part of the loss that follows its logits, in [0, 1]."}
    )
    distillation_temperature: float = dataclasses.field(
        default=2.0, metadata={"help": "Temperature of both distributions while the logits are compared."}
    )
    distillation_hidden_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the distance between the hidden states; 0 leaves them alone."}
    )
    without: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Parts of the method to leave out, for ablation tables: 'qadg' (each layer's rows are groups by "
            "themselves), 'projection' (widths are free until they are rounded), 'joint_rule' (pruning and "
            "quantization side by side)."
        },
    )

    def __post_init__(self) -> None:
        for name in (*WIDTHS, "group_sparsity", "target_bops", "target_size", "granularity"):
            if is_none(getattr(self, name)):
                object.__setattr__(self, name, None)
        for name in (
            "weight_bits",
            "activation_bits",
            "saliency_weights",
            "optional_axes",
            "modules_to_not_convert",
            "without",
        ):
            value = getattr(self, name)
            if isinstance(value, str):
                value = [value]
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
        if self.target_size is not None:
            object.__setattr__(self, "target_size", str(self.target_size))  # YAML reads 4000000 as a number
        if self.group_sparsity is None and not self.has_budget:
            object.__setattr__(self, "group_sparsity", DEFAULT_GROUP_SPARSITY)
        check_config(self)

    @property
    def has_budget(self) -> bool:
        """Whether a budget decides, instead of `group_sparsity`."""
        return self.target_bops is not None or self.target_size is not None

    @property
    def prunes(self) -> bool:
        """Whether the run may remove groups."""
        return self.group_sparsity is None or self.group_sparsity > 0

    @property
    def target_size_bytes(self) -> int | None:
        """`target_size` in bytes."""
        return None if self.target_size is None else parse_bytes(self.target_size)

    def allowed_bits(self, name: str) -> tuple[int, ...] | None:
        """The widths that one of `WIDTHS` allows at the end, ascending; None for float."""
        bits = getattr(self, name)
        if isinstance(bits, int):
            return (bits,)
        if bits is not None and "projection" in self.without:
            return tuple(range(MIN_BITS, MAX_BITS + 1))  # whatever can be packed
        if bits is None:
            return None
        if len(bits) > 2 or self.discrete_bits:
            return tuple(sorted(set(bits)))
        return tuple(range(bits[0], bits[1] + 1))

    def different_fields(self, other: GETAConfig) -> list[str]:
        """The names of the fields in which another config differs."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def in_words(self, names: Iterable[str]) -> str:
        """Some of the fields as they are written: "group_sparsity=0.5, weight_bits=(4, 8)"."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON/YAML values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GETAConfig:
        """A config from plain values; 1e-3, which YAML reads as text, is a number.

        Raises:
            ValueError: for a key that is no field, naming the fields there are.
        """
        refuse_unknown("field of GETAConfig", values, [field.name for field in dataclasses.fields(cls)])
        return cls(**with_numbers(values))

    @classmethod
    def from_file(cls, path: str | Path) -> GETAConfig:
        """A config from a YAML or JSON file: the whole file, or its `geta:` section if it has one."""
        values = read_values(path)
        return cls.from_dict(values.get(SECTION, values) or {})

    def save(self, path: str | Path) -> None:
        """Write the config as JSON (which is YAML too)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


# 1e-3 and 1.5e3, which YAML 1.1 takes for text
_EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def with_numbers(values: Any) -> Any:
    """What YAML gives, with the numbers that it leaves as text: 1e-3."""
    if isinstance(values, dict):
        return {key: with_numbers(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(map(with_numbers, values))
    return float(values) if isinstance(values, str) and _EXPONENTIAL.fullmatch(values) else values


def read_values(path: str | Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file; its section `geta:`, if it has one, is a dictionary or None.

    Raises:
        ValueError: for what is no such file.
    """
    import yaml  # with transformers always, but only readers of files need it

    try:
        text = Path(path).read_text(encoding="utf-8")
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no YAML file of a run: {str(error).partition(chr(10))[0]}") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not isinstance(values.get(SECTION) or {}, dict):
        raise ValueError(f"{path} is no run: it holds no keys, or no section {SECTION}:, as the files in configs/ do.")
    return values
