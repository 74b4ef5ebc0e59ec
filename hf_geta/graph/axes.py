"""The axis algebra: which dimensions of which tensors are the same axis, and how an axis is made of others.

Every dimension of every tensor is an axis, a node of a union-find. An axis may be refined into an ordered PRODUCT
(a view: 48 -> 4 heads x 12, row-major) or an ordered CONCATENATION (cat, split, slice: a fused 96 -> 32 + 32 + 32).
Unifying two axes aligns their refinements, so that what is not refined any further, a leaf, is the finest thing
that can be removed on its own. A leaf is frozen, with the reasons, where removing entries would change the function.

Nothing here knows about tensors or operators. Entries of size 1 carry no choice and never appear as parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

MAX_REASONS = 4  # per leaf; a residual stream is frozen by every norm, the first few explain it


@dataclass(frozen=True)
class Reason:
    """Why an axis cannot be pruned: in words, the operator that froze it, the module in whose forward it ran."""

    text: str
    operator: str = ""
    module: str = ""

    def __str__(self) -> str:
        place = " in ".join(part for part in (self.operator, self.module) if part)
        return f"{self.text} ({place})" if place else self.text


UNALIGNED = Reason("its entries are laid out in a way that a view cannot follow")


class AxisNode:
    """One axis. `parts` is empty for a leaf; `is_product` tells PRODUCT from CONCATENATION otherwise."""

    __slots__ = ("_parent", "_reasons", "_tags", "is_product", "parts", "size")

    def __init__(self, size: int, parts: Sequence[AxisNode] = (), is_product: bool = True) -> None:
        self.size = size
        self.parts = tuple(parts)
        self.is_product = is_product
        self._parent: AxisNode | None = None
        self._reasons: tuple[Reason, ...] = ()
        self._tags: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        axis = find(self)
        if not axis.parts:
            return f"{axis.size}{'!' * is_frozen(axis)}"
        return f"({(' * ' if axis.is_product else ' + ').join(map(repr, axis.parts))})"


def find(axis: AxisNode) -> AxisNode:
    """The representative of all axes unified with `axis`."""
    root = axis
    while root._parent is not None:
        root = root._parent
    while axis._parent is not None:
        axis._parent, axis = root, axis._parent
    return root


def leaves(axis: AxisNode) -> Iterator[AxisNode]:
    """The leaves that `axis` is made of, in order; a leaf that is used twice comes twice."""
    pending = [axis]
    while pending:
        axis = find(pending.pop())
        pending.extend(reversed(axis.parts))
        if not axis.parts:
            yield axis


def freeze(axis: AxisNode, reason: Reason) -> None:
    """Mark every leaf of `axis` as not prunable."""
    for leaf in leaves(axis):
        _annotate(leaf, (reason,), frozenset())


def tag(axis: AxisNode, name: str) -> None:
    """Note a use of every leaf of `axis`; unifying and refining keep notes."""
    for leaf in leaves(axis):
        _annotate(leaf, (), frozenset((name,)))


def reasons(axis: AxisNode) -> tuple[Reason, ...]:
    """Why the leaves of `axis` are frozen, the earliest reasons first."""
    return tuple(dict.fromkeys(reason for leaf in leaves(axis) for reason in leaf._reasons))


def is_frozen(axis: AxisNode) -> bool:
    """Whether no leaf of `axis` may be pruned."""
    return all(leaf._reasons for leaf in leaves(axis))


def tags(axis: AxisNode) -> frozenset[str]:
    """The uses noted on any leaf of `axis`."""
    return frozenset[str]().union(*(leaf._tags for leaf in leaves(axis)))


def product(factors: Iterable[AxisNode]) -> AxisNode:
    """The axis whose entries are the row-major tuples of entries of `factors`."""
    kept = [factor for factor in factors if factor.size != 1]
    return kept[0] if len(kept) == 1 else AxisNode(math.prod(factor.size for factor in kept), kept)


def concatenation(pieces: Iterable[AxisNode]) -> AxisNode:
    """The axis whose entries are the entries of `pieces`, one piece after the other."""
    kept = [piece for piece in pieces if piece.size != 0]
    return kept[0] if len(kept) == 1 else AxisNode(sum(piece.size for piece in kept), kept, is_product=False)


def unify(first: AxisNode, second: AxisNode) -> None:
    """Make two axes one: entry i of the first is entry i of the second from now on.

    Raises:
        ValueError: for axes of different sizes.
    """
    pending = [(first, second)]
    while pending:
        first, second = map(find, pending.pop())
        if first is second:
            continue
        if first.size != second.size:
            raise ValueError(f"axes of sizes {first.size} and {second.size} cannot be the same axis.")
        if not first.parts:
            first, second = second, first
        if second.parts:
            pending.extend(reversed(_matched_parts(first, second)))
        else:  # a leaf: it takes the other's refinement and passes its notes on
            for leaf in leaves(first):
                _annotate(leaf, second._reasons, second._tags)
        second._parent = first


def align(factors: Sequence[AxisNode], sizes: Sequence[int]) -> list[AxisNode]:
    """Read the row-major product of `factors` as a product of axes of the given `sizes`, refining where needed.

    It is the primitive behind views, grouped queries and grouped convolutions: [12, 4] as (3, 16) splits the 12 into
    3 x 4 and returns the axes 3 and 4 x 4. Where boundaries do not divide, what lies around them is frozen.

    Raises:
        ValueError: if the products differ.
    """
    if math.prod(factor.size for factor in factors) != math.prod(sizes):
        raise ValueError(f"axes of sizes {[factor.size for factor in factors]} cannot be read as {list(sizes)}.")
    if 0 in sizes:  # nothing to lay out
        return [_give_up(factors, size) for size in sizes]
    pending = [factor for factor in reversed(factors) if factor.size != 1]
    aligned: list[AxisNode] = []
    for size in sizes:
        group: list[AxisNode] = []
        missing = size
        while missing > 1:
            axis = pending.pop()
            if missing % axis.size == 0:
                group.append(axis)
                missing //= axis.size
            elif axis.size % missing == 0:
                outer, inner = _factor(axis, missing)
                group.append(outer)
                pending.append(inner)
                missing = 1
            else:
                both = (axis, pending.pop())
                pending.append(_give_up(both, both[0].size * both[1].size))
        aligned.append(product(group))
    return aligned


def cut(axis: AxisNode, sizes: Sequence[int]) -> list[AxisNode]:
    """Read `axis` as a concatenation of pieces of the given `sizes`, refining where needed.

    A product is cut through its outer factor; where the boundary does not divide, the product is frozen.

    Raises:
        ValueError: if the sum differs.
    """
    if axis.size != sum(sizes):
        raise ValueError(f"an axis of size {axis.size} cannot be cut into {list(sizes)}.")
    pending = [axis]
    pieces: list[AxisNode] = []
    for size in sizes:
        group: list[AxisNode] = []
        missing = size
        while missing > 0:
            piece = find(pending.pop())
            if piece.size <= missing:
                group.append(piece)
                missing -= piece.size
            elif piece.parts and not piece.is_product:
                pending.extend(reversed(piece.parts))
            else:
                pending.extend(reversed(_halve(piece, missing)))
        pieces.append(concatenation(group))
    return pieces


def positions(axis: AxisNode) -> dict[AxisNode, torch.Tensor]:
    """Where the entries of each leaf lie in `axis`: leaf -> flat indices, int64 (leaf size, entries owned by each).

    A leaf that occurs in several parts owns entries in each of them. With a leaf that occurs twice in one product
    the entries of two leaf indices overlap.
    """
    axis = find(axis)
    if not axis.parts:
        return {axis: torch.arange(axis.size).unsqueeze(1)}
    found: dict[AxisNode, list[torch.Tensor]] = {}
    outer, inner, offset = 1, axis.size, 0
    for part in axis.parts if axis.is_product else _pieces(axis):
        inner //= part.size if axis.is_product else 1
        for leaf, indices in positions(part).items():
            if axis.is_product:  # entry (o, p, i) lies at (o * part.size + p) * inner + i
                rows = torch.arange(outer).view(1, -1, 1, 1) * part.size + indices[:, None, :, None]
                indices = (rows * inner + torch.arange(inner)).flatten(1)
            found.setdefault(leaf, []).append(indices + offset)
        outer *= part.size
        offset += 0 if axis.is_product else part.size
    return {leaf: torch.cat(indices, dim=1) for leaf, indices in found.items()}


def size_after(axis: AxisNode, sizes: Mapping[AxisNode, int]) -> int:
    """The size of `axis` when its leaves have the given sizes (their own where none is given)."""
    axis = find(axis)
    if not axis.parts:
        return sizes.get(axis, axis.size)
    if axis.is_product:
        return math.prod(size_after(part, sizes) for part in axis.parts)
    return sum(size_after(piece, sizes) for piece in _pieces(axis))


def _annotate(leaf: AxisNode, new_reasons: tuple[Reason, ...], new_tags: frozenset[str]) -> None:
    if new_reasons and len(leaf._reasons) < MAX_REASONS:
        leaf._reasons = tuple(dict.fromkeys((*leaf._reasons, *new_reasons)))[:MAX_REASONS]
    if new_tags:
        leaf._tags |= new_tags


def _refine(leaf: AxisNode, sizes: Sequence[int], is_product: bool) -> tuple[AxisNode, ...]:
    leaf.parts = tuple(AxisNode(size) for size in sizes)
    leaf.is_product = is_product
    for part in leaf.parts:
        _annotate(part, leaf._reasons, leaf._tags)
    return leaf.parts


def _pieces(axis: AxisNode) -> Iterator[AxisNode]:
    """What a concatenation, and the concatenations in it, consist of; in a loop, since pieces of pieces go deep."""
    pending = [axis]
    while pending:
        piece = find(pending.pop())
        if piece.parts and not piece.is_product:
            pending.extend(reversed(piece.parts))
        else:
            yield piece


def _matched_parts(first: AxisNode, second: AxisNode) -> list[tuple[AxisNode, AxisNode]]:
    """Pairs of axes that are the same if two axes with parts are."""
    if second.is_product and not first.is_product:  # the product is cut as the concatenation is
        first, second = second, first
    sizes = [part.size for part in second.parts]
    parts = align(first.parts, sizes) if second.is_product else cut(first, sizes)
    return list(zip(parts, second.parts, strict=True))


def _factor(axis: AxisNode, outer_size: int) -> tuple[AxisNode, AxisNode]:
    """`axis` as a product of two, the outer of the given size, which divides."""
    axis = find(axis)
    inner_size = axis.size // outer_size
    if not axis.parts:
        outer, inner = _refine(axis, (outer_size, inner_size), is_product=True)
    elif axis.is_product:
        outer, inner = align(axis.parts, (outer_size, inner_size))
    elif all(part.size % inner_size == 0 for part in axis.parts):  # q + k + v as (heads of q, k, v) x head size
        inner = AxisNode(inner_size)
        outers = [AxisNode(part.size // inner_size) for part in axis.parts]
        for part, part_outer in zip(axis.parts, outers, strict=True):
            unify(part, product((part_outer, inner)))
        outer = concatenation(outers)
    else:
        outer, inner = _factor(_give_up([axis], axis.size), outer_size)
    return outer, inner


def _halve(axis: AxisNode, size: int) -> Sequence[AxisNode]:
    """The first `size` entries of a leaf or product, and the rest."""
    if not axis.parts:
        return _refine(axis, (size, axis.size - size), is_product=False)
    outer, *inner = axis.parts
    rows, rest = divmod(size, axis.size // outer.size)
    if rest:
        return _halve(_give_up([axis], axis.size), size)
    return [product((half, *inner)) for half in cut(outer, (rows, outer.size - rows))]


def _give_up(axes: Iterable[AxisNode], size: int) -> AxisNode:
    """Freeze `axes`; a stand-in of the given size, frozen too, for what was to be read from them."""
    stand_in = AxisNode(size)
    for axis in (*axes, stand_in):
        freeze(axis, UNALIGNED)
    return stand_in
