"""The module tree of a model with its axes, folded: what a picture of the search space shows, before any drawing.

Layers of one list fold into a block where they are built alike: the same tensors, tied in the same way by axes of
their own, or by the very same axes. The sizes of their own axes may differ, as they do in a pruned model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hf_geta.graph.folding import common_path, fold_names
from hf_geta.graph.qadg import QADG
from hf_geta.graph.table import Tensors

MIN_BLOCK_ROWS = 3  # fewer rows are shown inline, with the path in front

Owners = tuple[tuple[int, int], ...]  # (number of the axis, entries that it owns), in order


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor and of its copies: sizes, the ties that cut it, and why it is frozen if none does."""

    sizes: tuple[int, ...]
    ties: tuple[tuple[int, float], ...]  # number in Picture.ties, share of the dimension that it owns
    reason: str | None


@dataclass(frozen=True)
class Cell:
    """A tensor, and its copies in the folded layers."""

    names: tuple[str, ...]
    dimensions: tuple[Dimension, ...]
    tied_to: str | None = None


@dataclass(frozen=True)
class Row:
    """One line: the main tensor of a module, and the vectors (biases, running means) that go with it."""

    path: str  # within the block, folded
    cells: tuple[Cell, ...]
    copies: int  # within the block


@dataclass(frozen=True)
class Block:
    """A module of a list, or several that are built alike; `path` is folded and within the block around it."""

    path: str
    copies: int
    items: tuple[Row | Block, ...]

    def rows(self) -> Iterator[Row]:
        """All rows, from top to bottom."""
        for item in self.items:
            yield from (item,) if isinstance(item, Row) else item.rows()


@dataclass(frozen=True)
class Picture:
    """The folded model; `ties` has for each tie the numbers of the axes that it stands for, one per folded layer."""

    root: Block
    ties: tuple[tuple[int, ...], ...]


@dataclass
class _Module:
    path: tuple[str, ...]
    tensors: list[str] = field(default_factory=list)
    children: dict[str, _Module] = field(default_factory=dict)

    def weight_count(self) -> int:
        """How many modules here have tensors of their own."""
        return bool(self.tensors) + sum(child.weight_count() for child in self.children.values())

    def subtree(self) -> Iterator[str]:
        yield from self.tensors
        for child in self.children.values():
            yield from child.subtree()


def fold_blocks(qadg: QADG, tensors: Tensors) -> Picture:
    """The tensors that matter (parameters, and buffers that an axis cuts), in the order of the model, folded."""
    return _Folding(qadg, tensors).picture()


class _Folding:
    def __init__(self, qadg: QADG, tensors: Tensors) -> None:
        self._tensors = tensors
        self._owners: dict[tuple[str, int], list[tuple[int, int]]] = {}
        self._homes = []  # per axis: the path that all its modules share
        for number, axis in enumerate(qadg.axes):
            self._homes.append(tuple(common_path([member.tensor.split(".")[:-1] for member in axis.members])))
            for member in axis.members:
                owned = member.indices.shape[0] * member.indices.shape[1]
                self._owners.setdefault((member.tensor, member.dim), []).append((number, owned))
        self._kinds = [axis.kind for axis in qadg.axes]
        self._reasons = {
            name: " ".join(filter(None, (frozen.reason, f"({frozen.operator})" if frozen.operator else "")))
            for frozen in qadg.frozen
            for name in frozen.dimensions
        }
        self._signatures: dict[tuple[str, ...], tuple] = {}
        self._ties: dict[tuple[int, ...], int] = {}

    def picture(self) -> Picture:
        owned = {name for name, _ in self._owners}
        root = _Module(())
        for name in self._tensors.shapes:
            if name in self._tensors.buffers and name not in owned:
                continue
            *steps, _ = name.split(".")
            module = root
            for step in steps:
                module = module.children.setdefault(step, _Module((*module.path, step)))
            module.tensors.append(name)
        items = tuple(self._items([root], []))
        return Picture(Block("", 1, items), tuple(self._ties))

    def _items(self, copies: Sequence[_Module], prefix: Sequence[Sequence[str]]) -> Iterator[Row | Block]:
        """Rows and blocks of modules that are built alike; `prefix` has their paths within the block around."""
        first = copies[0]
        yield from self._rows(copies, prefix)
        for names in self._alike(first):
            children = [module.children[name] for module in copies for name in names]
            paths = [[*path, name] for path in prefix or [[]] for name in names]
            is_list = names[0].isdecimal()
            if is_list and children[0].weight_count() >= MIN_BLOCK_ROWS:
                yield Block(_folded(paths), len(paths), tuple(self._items(children, [])))
            else:
                yield from self._items(children, paths)

    def _alike(self, module: _Module) -> list[list[str]]:
        """The children in order, those of a list together that are built alike."""
        groups: dict[object, list[str]] = {}
        for name, child in module.children.items():
            key = self._signature(child) if name.isdecimal() else name
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _signature(self, module: _Module) -> tuple:
        """Equal for modules that a picture can show as one."""
        if module.path not in self._signatures:
            depth = len(module.path)
            own: dict[int, int] = {}  # axes that lie in this module, in the order met
            found: list[tuple] = []
            for name in module.subtree():
                relative = ".".join(name.split(".")[depth:])
                if name in self._tensors.tied:
                    found.append((relative, self._tensors.tied[name]))
                    continue
                for dim, size in enumerate(self._tensors.shapes[name]):
                    owners: list[tuple[int, str]] = []
                    is_own = False
                    for number, _ in self._owners.get((name, dim), ()):
                        if self._homes[number][:depth] == module.path:
                            is_own = True
                            owners.append((own.setdefault(number, len(own)), self._kinds[number]))
                        else:
                            owners.append((number, "of others"))
                    reason = self._reasons.get(f"{name}[{dim}]")
                    found.append((relative, dim, None if is_own else size, tuple(owners), reason))
            self._signatures[module.path] = tuple(found)
        return self._signatures[module.path]

    def _rows(self, copies: Sequence[_Module], prefix: Sequence[Sequence[str]]) -> Iterator[Row]:
        """The tensors of a module: one row for each with two dimensions or more, with the vectors at the first."""
        cells = [self._cell([module.tensors[place] for module in copies]) for place in range(len(copies[0].tensors))]
        mains = [cell for cell in cells if len(cell.dimensions) != 1] or cells[:1]
        vectors = [cell for cell in cells if cell not in mains]
        for cell in mains:
            attached = vectors if cell is mains[0] else []
            paths = prefix or [[]]
            last = cell.names[0].rpartition(".")[2]
            if len(mains) > 1 or last not in ("weight", "bias") or not paths[0]:
                paths = [[*path, last] for path in paths]
            yield Row(_folded(paths), (cell, *attached), len(paths))

    def _cell(self, names: Sequence[str]) -> Cell:
        if names[0] in self._tensors.tied:
            return Cell(tuple(names), (), self._tensors.tied[names[0]])
        dimensions = []
        for dim in range(len(self._tensors.shapes[names[0]])):
            sizes = [self._tensors.shapes[name][dim] for name in names]
            owners = [self._owners.get((name, dim), []) for name in names]
            ties = tuple(
                (self._tie(tuple(number for number, _ in place)), place[0][1] / sizes[0]) for place in zip(*owners)
            )
            reason = None if ties else self._reasons.get(f"{names[0]}[{dim}]", _unnamed(sizes[0]))
            dimensions.append(Dimension(tuple(sizes), ties, reason))
        return Cell(tuple(names), tuple(dimensions))

    def _tie(self, axes: tuple[int, ...]) -> int:
        return self._ties.setdefault(tuple(dict.fromkeys(axes)), len(self._ties))


def _unnamed(size: int) -> str:
    return "it has one entry" if size == 1 else "not used by the traced forward"


def _folded(paths: Sequence[Sequence[str]]) -> str:
    return ", ".join(fold_names(".".join(path) for path in paths))
