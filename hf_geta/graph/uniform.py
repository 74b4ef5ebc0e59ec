"""Axes that shrink in lockstep, so that an ordinary config can state what is left of them.

A field such as `intermediate_size` states one size for every layer, and `num_attention_heads` with
`num_key_value_heads` one number of heads: the axes that the same fields state are a family. What no field states by
itself (heads of a model whose head size is width / heads) stays whole.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from hf_geta.graph.fields import Changes, ConfigFields, Dim, agrees_with, connected, format_path
from hf_geta.graph.folding import fold_names
from hf_geta.graph.qadg import QADG, Axis
from hf_geta.graph.tracing import named_tensors

TRIED_SIZES = 6  # per family, until the config is found to state one of them
ASKED_SIZES = 256  # axes up to this many groups are heads and the like, of which a config may refuse some numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Axes of one size that the same fields of the config state.

    Attributes:
        axes: their names, in the order of the search space.
        sizes: what may be left of each, ascending; the last is all of it.
        fields: what states them, such as "num_attention_heads".
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    fields: tuple[str, ...]


def make_uniform(qadg: QADG, model: PreTrainedModel) -> tuple[QADG, tuple[Family, ...]]:
    """The search space without the axes that no ordinary config can state, and the families of the others.

    Raises:
        ValueError: if the model is not the one that its config builds.
    """
    fields = ConfigFields(model)
    if any(fields.shapes.get(name) != tuple(tensor.shape) for name, tensor in model.state_dict().items()):
        raise ValueError(
            f"uniform=True: {fields.name} does not build this {type(model).__name__} (it is pruned already, or changed "
            "by hand), so that no other values in it can state what is left: start from an ordinary model."
        )
    families = tuple(_families(qadg, fields, _aliases(model)))
    named = {name for family in families for name in family.axes}
    whole = [axis.name for axis in qadg.axes if axis.name not in named]
    for family in families:
        logger.info("uniform: %s go together, by %s.", _listed(family.axes), ", ".join(family.fields))
    if whole:
        logger.warning(
            "uniform=True: %s stay whole: no field of %s states their size alone.", _listed(whole), fields.name
        )
    return qadg.without(dict.fromkeys(whole, f"no field of {fields.name} states its size alone")), families


def _families(qadg: QADG, fields: ConfigFields, aliases: Mapping[str, Sequence[str]]) -> Iterable[Family]:
    entries = {axis.name: _entries(axis, aliases) for axis in qadg.axes}
    prunable = {dim for dims in entries.values() for dim in dims}
    of_axes = {axis.name: frozenset(entries[axis.name]) for axis in qadg.axes}
    of_fields = {path: dims for path, dims in fields.dims.items() if dims <= prunable}
    for part in connected({**of_axes, **of_fields}):
        axes = [axis for axis in qadg.axes if axis.name in part]
        if len({axis.size for axis in axes}) > 1 or len(axes) == len(part):
            continue
        changes, kept = _first_solution(qadg, fields, axes, entries)
        if changes:
            sizes = _sizes(fields, changes, kept, axes[0].size)
            yield Family(tuple(axis.name for axis in axes), sizes, tuple(map(format_path, changes)))


def _first_solution(
    qadg: QADG, fields: ConfigFields, axes: Sequence[Axis], entries: Mapping[str, Mapping[Dim, int]]
) -> tuple[Changes, int]:
    """(changes of the config that leave `kept` groups of every axis, kept); no changes where none do."""
    size = axes[0].size
    for kept in list(dict.fromkeys([size // 2, *range(size - 1, 0, -1)]))[:TRIED_SIZES]:
        gone: Counter[Dim] = Counter()
        for axis in axes:
            gone.update({dim: (size - kept) * owned for dim, owned in entries[axis.name].items()})
        wanted = {(name, dim): fields.shapes[name][dim] - count for (name, dim), count in gone.items()}
        attributes = qadg.attributes_after({axis.name: range(size - kept) for axis in axes})
        with contextlib.suppress(ValueError):
            return fields.solve(wanted, partial(agrees_with, attributes=attributes)), kept
    return {}, 0


def _sizes(fields: ConfigFields, changes: Changes, kept: int, size: int) -> tuple[int, ...]:
    """The numbers of groups that the config takes: the fields are proportional to them."""

    def stated(groups: int) -> bool:
        if any(value * groups % kept for value in changes.values()):
            return False
        return size > ASKED_SIZES or fields.accepts({path: value * groups // kept for path, value in changes.items()})

    return (*(groups for groups in range(1, size) if stated(groups)), size)


def _entries(axis: Axis, aliases: Mapping[str, Sequence[str]]) -> dict[Dim, int]:
    """How many entries of which dimensions one group owns, under every name that a tensor has."""
    owned: Counter[Dim] = Counter()
    for member in axis.members:
        for name in aliases[member.tensor]:
            owned[name, member.dim] += member.indices.shape[1]
    return dict(owned)


def _aliases(model: PreTrainedModel) -> dict[str, list[str]]:
    """Every name of a tensor -> all of its names."""
    tensors = named_tensors(model)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: names[id(tensor)] for name, tensor in tensors.items()}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(fold_names(names))
