"""GETAConfig: everything that one compression run needs to know, checked before any step is spent.

The same object is written in Python, read from YAML/JSON, and parsed from the command line by
`transformers.HfArgumentParser`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

GRANULARITIES = ("tensor", "channel")
SALIENCIES = ("magnitude", "taylor", "fisher")
OPTIONAL_AXES = ("query_head", "head_dim")  # kinds that are left alone unless they are asked for
MIN_BITS, MAX_BITS = 2, 16


@dataclasses.dataclass(frozen=True)
class GETAConfig:
    """What to compress, how far, and when (Qu et al., CVPR 2025, arXiv 2502.16638, Algorithm 2).

    The widths are ranges `(lower, upper)` in bits; every width is inside its range after every optimizer step
    past the warm-up. Stage lengths follow the habit of `TrainingArguments.warmup_steps`: below 1 a share of the
    run's optimizer steps, otherwise a number of steps. What they leave is the cool-down.

    Raises:
        ValueError: for a value outside its domain; the message names the value and the way out.
    """

    group_sparsity: float = dataclasses.field(
        default=0.5, metadata={"help": "Share of all pruning groups that the run removes, in [0, 1)."}
    )
    # `list` because HfArgumentParser reads lists from the command line; kept as a tuple.
    weight_bits: list[int] = dataclasses.field(
        default_factory=lambda: [4, 8], metadata={"help": "Range of the weight widths in bits: lower upper."}
    )
    activation_bits: list[int] | None = dataclasses.field(
        default=None, metadata={"help": "Range of the activation widths in bits; none leaves activations in float."}
    )
    granularity: str = dataclasses.field(
        default="tensor",
        metadata={"help": "One clip per weight 'tensor' or per output 'channel'; the width is one per tensor."},
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
        default="taylor", metadata={"help": "Score of a group: 'magnitude', 'taylor' or 'fisher'."}
    )
    min_groups: int = dataclasses.field(
        default=1, metadata={"help": "Groups that every axis keeps at least (heads, hidden units, channels)."}
    )
    group_divisible: int = dataclasses.field(
        default=1,
        metadata={"help": "Kept sizes of axes longer than this are multiples of it (8, 16, 32: what hardware likes)."},
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
            "help": "Learning rate of the quantizers; they live in log space, so it is a relative change per step."
        },
    )
    calibration_batches: int = dataclasses.field(
        default=4, metadata={"help": "Training batches that set the activation ranges before the first step."}
    )
    modules_to_not_convert: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Modules kept in float; by default output embeddings and tied layers."}
    )

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "optional_axes", "modules_to_not_convert"):
            value = getattr(self, name)
            if name in ("optional_axes", "modules_to_not_convert") and isinstance(value, str):
                value = [value]
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(value))
        for name in ("group_sparsity", "initial_bits", "warmup_steps", "projection_steps", "joint_steps"):
            if not isinstance(value := getattr(self, name), int | float):
                raise ValueError(f"{name}={value!r}: write a number.")
        if not 0 <= self.group_sparsity < 1:
            raise ValueError(f"group_sparsity={self.group_sparsity}: a share in [0, 1); 0 keeps every group.")
        if not MIN_BITS <= self.initial_bits <= MAX_BITS:
            raise ValueError(f"initial_bits={self.initial_bits}: write a width from {MIN_BITS} to {MAX_BITS}.")
        self._check_bits("weight_bits")
        if self.activation_bits is not None:
            self._check_bits("activation_bits")
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("saliency", self.saliency, SALIENCIES)
        for kind in self.optional_axes:
            _check_choice("optional_axes", kind, OPTIONAL_AXES)
        for name in ("bit_reduction", "pruning_periods", "min_groups", "group_divisible", "calibration_batches"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name}={value}: write a whole number, 1 or more.")
        for name in ("warmup_steps", "projection_steps", "joint_steps"):
            value = getattr(self, name)
            if not (0 <= value < 1 or (value >= 1 and float(value).is_integer())):
                raise ValueError(f"{name}={value}: write a share in [0, 1) or a whole number of steps.")
        if not self.quantizer_learning_rate >= 0:
            raise ValueError(f"quantizer_learning_rate={self.quantizer_learning_rate}: write 0 or more.")

    def _check_bits(self, name: str) -> None:
        bits = getattr(self, name)
        if not isinstance(bits, tuple) or len(bits) != 2 or not all(isinstance(b, int) for b in bits):
            raise ValueError(f"{name}={bits}: write two whole numbers, the lower and the upper width, such as (4, 8).")
        lower, upper = bits
        if lower > upper:
            raise ValueError(f"{name}={bits}: the lower bound comes first; write {name}=({upper}, {lower}).")
        if lower < MIN_BITS or upper > MAX_BITS:
            raise ValueError(f"{name}={bits}: widths go from {MIN_BITS} to {MAX_BITS} bits, the sign included.")
        if upper > self.initial_bits:
            raise ValueError(
                f"{name}={bits} starts above initial_bits={self.initial_bits}: raise initial_bits to at least {upper}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON/YAML values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GETAConfig:
        """A config from plain values.

        Raises:
            ValueError: for a key that is no field, naming the fields there are.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(fields)):
            raise ValueError(f"GETAConfig has no field {', '.join(unknown)}; its fields are {', '.join(fields)}.")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> GETAConfig:
        """A config from a YAML or JSON file: the whole file, or its `geta:` section if it has one."""
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".json":
            values = json.loads(text)
        else:
            import yaml  # with transformers always, but only YAML readers need it

            values = yaml.safe_load(text)
        return cls.from_dict(values.get("geta", values))

    def save(self, path: str | Path) -> None:
        """Write the config as JSON (which is YAML too)."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
