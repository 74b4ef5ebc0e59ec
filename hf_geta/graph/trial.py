"""Is it so? The law of the search space, run on the model itself: masked and pruned compute the same.

A rule may be wrong, and a forward may hold sizes where no trace sees them. So what was found is tried: on the model's
own weights where that is cheap or asked for, else on fake tensors, where shapes must fit. What fails is frozen, and the
rest goes on.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from hf_geta.checkpoint.models import first_line
from hf_geta.graph.capture import TRACING_ERRORS, plain_copy
from hf_geta.graph.qadg import QADG
from hf_geta.graph.tracing import float_tensors, named_tensors, quiet_torch

# How far pruned may be from masked, of what masking moves and of the output's scale: sums in another order stay far
# below in most models (float64 decides about the others), and a wrong slice moves an output as much as masking does.
OF_MOVED, OF_SCALE = 1e-2, 1e-4

Failure = Callable[[Sequence[str]], str]  # axis names -> what goes wrong when all of them shrink, or ""


class Law:
    """Called with axis names: what goes wrong when groups of all of them are removed; "" where nothing does."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        qadg: QADG,
        share: float = 0.4,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.qadg = model, qadg
        self.cast = functools.partial(cast, dtype=dtype)
        self.inputs = pytree.tree_map_only(Tensor, self.cast, dict(inputs))
        draw = random.Random(seed)
        self.removed = {
            axis.name: draw.sample(range(axis.size), min(axis.size - 1, max(1, int(share * axis.size))))
            for axis in qadg.axes
        }
        self.dense = run(plain_copy(model, self.cast), self.inputs)
        if not any(tensor.isfinite().any() for tensor in self.dense.values()):
            raise ValueError("it computes no finite number")

    def masked(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The outputs when the removed groups of these axes are zero."""
        twin = plain_copy(self.model, self.cast)
        touched = {member.tensor for axis in self.qadg.axes for member in axis.members}
        for name, tensor in named_tensors(twin).items():
            if name in touched:
                tensor.data = tensor.data.clone()
        self.qadg.zero_(twin, {name: self.removed[name] for name in names})
        return run(twin, self.inputs)

    def outputs_or_error(self, names: Iterable[str]) -> dict[str, Tensor] | str:
        """The outputs when these groups are cut out, or the error that this ends in, unless memory ends."""
        try:
            twin = plain_copy(self.model, self.cast)
            self.qadg.prune_(twin, {name: self.removed[name] for name in names})
            return run(twin, self.inputs)
        except TRACING_ERRORS as error:
            if should_reduce_batch_size(error):  # which says nothing of the groups
                raise
            return describe_error(error)

    def __call__(self, names: Sequence[str]) -> str:
        pruned = self.outputs_or_error(names)
        if isinstance(pruned, str):
            return pruned
        masked = self.masked(names)
        for name, tensor in masked.items():
            scale = _largest(self.dense.get(name, tensor))
            moved, error = _difference(self.dense.get(name), tensor), _difference(tensor, pruned.get(name))
            if not error <= max(OF_MOVED * moved, OF_SCALE * scale):
                where = name or "the output"
                return f"pruned and masked differ by {error:.1e} in {where}, which masking moves by {moved:.1e}"
        return ""


class ShapeLaw:
    """The same on fake tensors: what goes wrong with shapes when these axes shrink."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], qadg: QADG, share: float = 0.4) -> None:
        self.model, self.inputs, self.qadg = model, inputs, qadg
        self.removed = {axis.name: range(max(1, int(share * axis.size))) for axis in qadg.axes}

    def __call__(self, names: Sequence[str]) -> str:
        try:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            twin = plain_copy(self.model, mode.from_tensor)
            self.qadg.prune_(twin, {name: self.removed[name] for name in names})
            with mode, quiet_torch():
                run(twin, pytree.tree_map_only(Tensor, mode.from_tensor, dict(self.inputs)))
            return ""
        except TRACING_ERRORS as error:
            return describe_error(error)


def failing(names: Sequence[str], law: Failure) -> dict[str, str]:
    """The axes that cannot shrink, with the reason, such that all others can together.

    Raises:
        ValueError: if the law breaks where nothing shrinks: the model draws numbers, or does not run like this.
    """
    if not names or not law(names):
        return {}
    if problem := law(()):
        raise ValueError(problem)
    kept: list[str] = []
    failures: dict[str, str] = {}

    def add(more: Sequence[str]) -> None:
        if not (reason := law([*kept, *more])):
            kept.extend(more)
        elif len(more) == 1:
            failures[more[0]] = reason
        else:
            add(more[: len(more) // 2])
            add(more[len(more) // 2 :])

    add(names[: len(names) // 2])
    add(names[len(names) // 2 :])
    return failures


@torch.no_grad()
def run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """All float tensors that `model(**inputs)` returns in eval mode, by name; caches are not looked into."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some forwards draw numbers
        return float_tensors(model.eval()(**inputs))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor's numbers, in the precision that outputs are compared in if they are floats."""
    return tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data


def other_inputs(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs with another batch, where there are tokens another length, and padded where there is a mask."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    lengths = {value.shape[1] for value in tensors.values() if value.ndim == 2 and not value.is_floating_point()}
    longer = {name: torch.cat((value, value)) for name, value in tensors.items()}
    for length in lengths:
        fewer = max(1, length - max(1, length // 3))
        yield {
            **inputs,
            **{
                name: value[:, :fewer] if value.ndim > 1 and value.shape[1] == length else value
                for name, value in longer.items()
            },
        }
    yield {**inputs, **longer}
    mask = tensors.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        padded = mask.clone()
        padded[0, -max(1, mask.shape[1] // 3) :] = 0
        yield {**inputs, "attention_mask": padded}


def describe_error(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    """The largest absolute difference; infinite where shapes or what is infinite differ."""
    if one is None or other is None or one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf")
    return _largest(one - other)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of two outputs, each tensor on its own scale."""
    return max((_difference(one[name], other.get(name)) / max(_largest(one[name]), 1e-30) for name in one), default=0.0)
