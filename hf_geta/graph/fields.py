"""Which numbers of a config state which sizes? Tried on the meta device, so that it holds for any family.

A pruned model is an ordinary model of its class exactly if some config builds it. Every int of the config is changed
once, and the shapes of the model that it then builds tell what the field states. Sizes are solved for by trial as well:
v -> v * kept / dense in few fields at a time, until the shapes are those that are wanted.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from hf_geta.checkpoint.models import build_by_class, without_quantization
from hf_geta.graph.folding import fold_names
from hf_geta.graph.tracing import named_tensors
from hf_geta.quantization.experts import split_named_experts_, stacked_layers

Dim = tuple[str, int]  # a tensor and one of its dimensions
Path = tuple[str | int, ...]  # of a field: ("text_config", "intermediate_size"), ("hidden_sizes", 1)
Changes = Mapping[Path, int]

Owner = TypeVar("Owner")

INSTEAD_OF_NONE = 8  # tried in a field without a value
MOST_FIELDS = 3  # that change together: query heads, key-value heads, experts' sizes
MOST_VALUES = 3  # tried per field: sizes that differ more than that are not those of one field
MOST_LISTED = 6  # sizes that an error names: enough to see the pattern, and the way out stays in sight


class ConfigFields:
    """What the ints of a model's config state.

    Args:
        model: of a class that its config builds; its tensors are not looked at.

    Attributes:
        shapes: of all parameters and buffers of the model that the config builds; empty if it builds none.
        dims: field -> the dimensions that it states, for those that state any.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model_class, self._config_class = type(model), type(model.config)
        self._stacked = stacked_layers(model)
        self._dict = without_quantization(model.config).to_dict()
        self.shapes = self._shapes_with({}) or {}
        for path, size in list(_implied_head_sizes(self._dict)):
            self._state_if_read(path, size)
        self.values = dict(_ints(self._dict))
        moved = {path: self._moved_by(path, value) for path, value in self.values.items() if self.shapes}
        self.dims = {path: dims for path, dims in moved.items() if dims}

    def config_with(self, changes: Changes) -> PreTrainedConfig:
        """The config with other values in some fields, as one that is read from a file.

        Raises:
            whatever the class of the config raises where it refuses them.
        """
        values = copy.deepcopy(self._dict)
        for path, value in changes.items():
            _owner(values, path)[path[-1]] = value
        return self._config_class.from_dict(values)

    def build(self, changes: Changes) -> PreTrainedModel | None:
        """The model of the changed config, on the meta device; None where there is none."""
        with _silenced(), contextlib.suppress(Exception):
            built = build_by_class(self._model_class, self.config_with(changes))
            split_named_experts_(built, self._stacked)
            return built
        return None

    def accepts(self, changes: Changes) -> bool:
        """Whether the class of the config takes these values."""
        with _silenced(), contextlib.suppress(Exception):
            self.config_with(changes)
            return True
        return False

    def solve(
        self, wanted: Mapping[Dim, int], holds: Callable[[PreTrainedModel], bool] = lambda model: True
    ) -> dict[Path, int]:
        """The changes after which the config builds exactly these sizes, and all others as before.

        Args:
            wanted: the sizes of the dimensions that change.
            holds: what else the model on the meta device has to fulfil.

        Raises:
            ValueError: if no field states one of them, or if those that one field states differ.
        """
        usable = [path for path, dims in self.dims.items() if dims <= wanted.keys()]
        stated = set().union(*(self.dims[path] for path in usable))
        if missing := [dim for dim in wanted if dim not in stated]:
            raise ValueError(f"no field of {self.name} states the size of {_sizes(missing, wanted)}.")
        parts = []
        for fields in connected({path: self.dims[path] for path in usable}):
            dims = set().union(*(self.dims[path] for path in fields))
            part = {dim: size for dim, size in wanted.items() if dim in dims}
            if not (solutions := list(self._solutions(fields, part))):
                raise ValueError(
                    f"{', '.join(map(format_path, fields))} of {self.name} states the sizes of all layers at once, "
                    f"but they are {_sizes(part, wanted)}."
                )
            parts.append(solutions)
        for solution in itertools.product(*parts):
            changes = {path: value for part in solution for path, value in part.items()}
            if (built := self.build(changes)) is not None and shapes_of(built) == self._target(wanted) and holds(built):
                return changes
        raise ValueError(f"no {self.name} builds a model of these sizes: {_sizes(wanted, wanted)}.")

    @property
    def name(self) -> str:
        """The class of the config."""
        return self._config_class.__name__

    def _solutions(self, fields: Sequence[Path], wanted: Mapping[Dim, int]) -> Iterator[dict[Path, int]]:
        """Changes of these fields alone that give these sizes, those of fewest fields first."""
        values = {path: self._proposals(path, wanted) for path in fields}
        for count in range(1, min(len(fields), MOST_FIELDS) + 1):
            for paths in itertools.combinations([path for path in fields if values[path]], count):
                for choice in itertools.product(*(values[path] for path in paths)):
                    changes = dict(zip(paths, choice, strict=True))
                    if self._shapes_with(changes) == self._target(wanted):
                        yield changes

    def _proposals(self, path: Path, wanted: Mapping[Dim, int]) -> list[int]:
        """The values that a field may need: as much smaller as one of the dimensions that it states."""
        value, found = self.values[path], set()
        for name, dim in self.dims[path]:
            kept, dense = wanted[name, dim], self.shapes[name][dim]
            if value is None:
                found.add(kept)
            elif value * kept % dense == 0:
                found.add(value * kept // dense)
        return sorted(found) if len(found) <= MOST_VALUES else []

    def _target(self, wanted: Mapping[Dim, int]) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(wanted.get((name, dim), size) for dim, size in enumerate(shape))
            for name, shape in self.shapes.items()
        }

    def _shapes_with(self, changes: Changes) -> dict[str, tuple[int, ...]] | None:
        built = self.build(changes)
        return None if built is None else shapes_of(built)

    def _state_if_read(self, path: Path, size: int) -> None:
        """Write out the size of a head, width / heads by default, if the model's code would read another one."""
        if self._shapes_with({path: size}) == self.shapes and self._moved_by(path, size):
            _owner(self._dict, path)[path[-1]] = size

    def _moved_by(self, path: Path, value: int | None) -> frozenset[Dim]:
        """The dimensions that change with a field; none where tensors come, go, or change their order."""
        tried = (INSTEAD_OF_NONE,) if value is None else (value // 2, value - 1, 2 * value)
        shapes = next(filter(None, (self._shapes_with({path: other}) for other in tried)), {})
        if shapes.keys() != self.shapes.keys() or any(len(shapes[n]) != len(self.shapes[n]) for n in shapes):
            return frozenset()
        pairs = ((name, dim) for name, shape in shapes.items() for dim in range(len(shape)))
        return frozenset((name, dim) for name, dim in pairs if shapes[name][dim] != self.shapes[name][dim])


def shapes_of(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Of every parameter and buffer, by each of its names."""
    return {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}


def connected(owned: Mapping[Owner, frozenset[Dim]]) -> list[list[Owner]]:
    """Those that own a dimension together, or by way of others, together."""
    parts: list[tuple[list[Owner], set[Dim]]] = []
    for owner, dims in owned.items():
        touching = [part for part in parts if part[1] & dims]
        parts = [part for part in parts if part not in touching]
        owners = itertools.chain(*(part[0] for part in touching), [owner])
        parts.append((list(owners), set(dims).union(*(part[1] for part in touching))))
    return [part[0] for part in parts]


def agrees_with(model: PreTrainedModel, attributes: Mapping[str, int]) -> bool:
    """Whether the attributes at these dotted paths have these values."""
    for path, value in attributes.items():
        owner: Any = model
        for step in path.split("."):
            owner = getattr(owner, step, None)
        if owner != value:
            return False
    return True


def format_path(path: Path) -> str:
    """ "text_config.intermediate_size", "hidden_sizes[1]"."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(steps).removeprefix(".")


def _ints(values: Any, path: Path = ()) -> Iterator[tuple[Path, int | None]]:
    """The fields that may state a size: numbers that could be smaller, and what has no value; of inner configs, too."""
    for step, value in values.items() if isinstance(values, dict) else enumerate(values):
        if _is_config(value) or (isinstance(value, list) and all(type(each) is int for each in value)):
            yield from _ints(value, (*path, step))
        elif value is None or (type(value) is int and value > 1):
            yield (*path, step), value


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "model_type" in value


def _implied_head_sizes(values: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, int]]:
    """Where a config has a width and a number of heads, but no size of a head: the field for it, and its value."""
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(width, int) and isinstance(heads, int) and values.get("head_dim") is None:
        yield (*path, "head_dim"), width // heads
    for name, value in values.items():
        if _is_config(value):
            yield from _implied_head_sizes(value, (*path, name))


def _owner(values: Any, path: Path) -> Any:
    """What holds the field."""
    for step in path[:-1]:
        values = values[step]
    return values


def _sizes(dims: Iterable[Dim], wanted: Mapping[Dim, int]) -> str:
    """The dimensions by their size: "model.layers.{0..2}.mlp.up_proj.weight[0] (48), ..."."""
    by_size: dict[int, list[str]] = {}
    for name, dim in dims:
        by_size.setdefault(wanted[name, dim], []).append(f"{name}[{dim}]")
    listed = [f"{folded} ({size})" for size, names in by_size.items() for folded in fold_names(names)]
    more = len(listed) - MOST_LISTED
    return ", ".join([*listed[:MOST_LISTED], *[f"and {more} more"] * (more > 0)])


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """What transformers says of configs that are only tried is of no interest."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
