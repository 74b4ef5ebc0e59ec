"""What the axis algebra says of random programs and random relations is true, and all of it is found."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_geta import build_qadg
from hf_geta.graph.axes import (
    UNALIGNED,
    AxisNode,
    align,
    concatenation,
    cut,
    find,
    freeze,
    is_frozen,
    leaves,
    positions,
    product,
    reasons,
    size_after,
    unify,
)
from tests.graph.axis_programs import WHY, Grower, ProgramModule, all_leaves, check_law

examples = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=200, **examples)
@given(st.integers(0, 2**32))
def test_a_random_program_without_the_slices_computes_what_it_computes_with_zeros(seed):
    draw = random.Random(seed)
    program = Grower(draw).program
    free = all_leaves(program)

    for leaf in free:
        check_law(program, {leaf: [draw.randrange(leaf.size)]})
    check_law(program, {leaf: draw.sample(range(leaf.size), draw.randint(0, leaf.size - 1)) for leaf in free})


def signature(axes: Sequence[AxisNode]) -> set[frozenset[tuple[int, int]]]:
    """Every group that can be pruned, as the set of (axis number, entry) that it takes away."""
    groups: dict[tuple[AxisNode, int], set[tuple[int, int]]] = {}
    for number, axis in enumerate(axes):
        for leaf, indices in positions(axis).items():
            if leaf.size > 1 and not is_frozen(leaf):
                for group, entries in enumerate(indices.tolist()):
                    groups.setdefault((leaf, group), set()).update((number, entry) for entry in entries)
    return {frozenset(group) for group in groups.values()}


def gave_up(axes: Iterable[AxisNode]) -> bool:
    return any(UNALIGNED in reasons(axis) for axis in axes)


# A tree says what an axis is made of: ("leaf", size, name), or ("product" | "concatenation", *trees).
Tree = tuple[Any, ...]
KINDS = ("product", "concatenation")


def tree_size(tree: Tree) -> int:
    if tree[0] == "leaf":
        return tree[1]
    return (math.prod if tree[0] == "product" else sum)(map(tree_size, tree[1:]))


def combine(kind: str, parts: Sequence[AxisNode]) -> AxisNode:
    return product(parts) if kind == "product" else concatenation(parts)


def random_tree(draw: random.Random, atoms: Sequence[Tree], depth: int = 3) -> Tree:
    if depth == 0 or draw.random() < 0.3:
        return draw.choice(atoms)
    tree = (
        draw.choice(KINDS),
        *(random_tree(draw, atoms, depth - 1) for _ in range(draw.choice((2, 2, 3)))),
    )
    return tree if tree_size(tree) <= 100 else draw.choice(atoms)


def rewritten(draw: random.Random, tree: Tree) -> Tree:
    """Another tree with the same entries: regrouped, or with a first factor that is joined spread over its pieces."""
    if tree[0] == "leaf":
        return tree
    kind, *parts = tree
    parts = [rewritten(draw, part) for part in parts]
    choice = draw.random()
    if choice < 0.4 and len(parts) > 2:  # (a b) c or a (b c)
        start = draw.randrange(len(parts) - 1)
        parts[start : start + 2] = [(kind, *parts[start : start + 2])]
    elif choice < 0.7:  # a (b c) as a b c
        where = draw.randrange(len(parts))
        if parts[where][0] == kind:
            parts[where : where + 1] = parts[where][1:]
    elif kind == "product" and parts[0][0] == "concatenation":  # (a + b) c as a c + b c
        return ("concatenation", *(("product", piece, *parts[1:]) for piece in parts[0][1:]))
    return (kind, *parts)


class World:
    """Axes about which nothing is known but relations that planted trees satisfy, in any order and direction.

    Subtrees that are alike are one axis at first: `node` gives it. An axis stands for every tree of `trees`.
    """

    def __init__(self, draw: random.Random) -> None:
        atoms = [("leaf", draw.choice((2, 2, 3, 4, 5, 6)), name) for name in "abcd"]
        self.trees = [random_tree(draw, atoms) for _ in range(draw.randint(1, 3))]
        self.relations: list[tuple[Tree, Tree]] = []
        for tree in list(self.trees):
            for _ in range(draw.randint(1, 3)):
                self.relations.append((tree, rewritten(draw, tree)))
        self.opaque = dict.fromkeys(part for pair in self.relations for tree in pair for part in subtrees(tree))

    def related(self, draw: random.Random) -> dict[Tree, AxisNode]:
        """The axes after all relations, each said in a random order and direction."""
        nodes = {tree: AxisNode(tree_size(tree)) for tree in self.opaque}
        said: list[Callable[[], None]] = []
        for first, second in self.relations:
            said.append(lambda pair=(nodes[first], nodes[second]): unify(*draw.sample(pair, 2)))
        for tree, node in nodes.items():
            if tree[0] != "leaf":
                parts = [nodes[part] for part in tree[1:]]
                said.append(lambda *_, kind=tree[0], node=node, parts=parts: self._say(draw, kind, node, parts))
        for say in draw.sample(said, len(said)):
            say()
        return nodes

    @staticmethod
    def _say(draw: random.Random, kind: str, node: AxisNode, parts: Sequence[AxisNode]) -> None:
        if draw.random() < 0.5:
            unify(*draw.sample((node, combine(kind, parts)), 2))
        else:
            sizes = [part.size for part in parts]
            for pair in zip(align([node], sizes) if kind == "product" else cut(node, sizes), parts, strict=True):
                unify(*draw.sample(pair, 2))


def subtrees(tree: Tree) -> Iterator[Tree]:
    yield tree
    for part in tree[1:] if tree[0] != "leaf" else ():
        yield from subtrees(part)


def planted(tree: Tree, atoms: dict[Tree, AxisNode]) -> AxisNode:
    if tree[0] == "leaf":
        return atoms.setdefault(tree, AxisNode(tree[1]))
    return combine(tree[0], [planted(part, atoms) for part in tree[1:]])


@settings(max_examples=200, **examples)
@given(st.integers(0, 2**32))
def test_the_order_in_which_relations_are_said_does_not_matter_and_every_solution_is_found(seed):
    draw = random.Random(seed)
    world = World(draw)
    found = [list(world.related(draw).values()) for _ in range(2)]
    assert not any(map(gave_up, found))
    groups = signature(found[0])
    assert groups == signature(found[1])
    atoms: dict[Tree, AxisNode] = {}
    for solution in signature([planted(tree, atoms) for tree in world.opaque]):
        parts = [group for group in groups if group <= solution]
        assert frozenset().union(*parts) == solution


def random_relations(draw: random.Random, kinds: Sequence[str] = KINDS) -> list[tuple[Tree, Tree]]:
    """Pairs of trees of equal sizes over shared leaves, whether or not anything but freezing makes them the same."""
    atoms = [("leaf", draw.choice((2, 2, 3, 4, 6, 8, 12)), name) for name in "abcdef"]
    by_size: dict[int, dict[Tree, None]] = {}
    for _ in range(40):
        tree = random_tree(draw, atoms, draw.choice((1, 2)))
        if all(part[0] in ("leaf", *kinds) for part in subtrees(tree)):
            by_size.setdefault(tree_size(tree), {})[tree] = None
    pairs = [tuple(draw.sample(list(trees), 2)) for trees in by_size.values() if len(trees) > 1]
    return draw.sample(pairs, min(len(pairs), draw.randint(1, 4)))


@settings(max_examples=200, **examples)
@given(st.integers(0, 2**32))
def test_whatever_is_said_the_same_axes_have_the_same_groups_and_nothing_thaws(seed):
    draw = random.Random(seed)
    relations = random_relations(draw)
    atoms: dict[Tree, AxisNode] = {}
    for number, (first, second) in enumerate(relations):
        both = planted(first, atoms), planted(second, atoms)
        if draw.random() < 0.3:
            freeze(draw.choice(list(atoms.values())), WHY)
        noted = {tree: (set(reasons(node)), thawed(node)) for tree, node in atoms.items()}
        unify(*both)
        for tree, (why, free) in noted.items():
            assert thawed(atoms[tree]) <= free
            assert bool(reasons(atoms[tree])) >= bool(why)
        for relation in relations[: number + 1]:
            left, right = (signature([planted(tree, atoms)]) for tree in relation)
            assert left == right


def thawed(axis: AxisNode) -> set[int]:
    """The entries that some group takes away."""
    return {entry for group in signature([axis]) for _, entry in group}


@settings(max_examples=150, **examples)
@given(st.integers(0, 2**32))
def test_saying_the_same_again_changes_nothing(seed):
    relations = random_relations(random.Random(seed))
    atoms: dict[Tree, AxisNode] = {}

    def say() -> tuple[bool, set[frozenset[tuple[int, int]]]]:
        for first, second in relations:
            unify(planted(first, atoms), planted(second, atoms))
        return gave_up(atoms.values()), signature(list(atoms.values()))

    first, second = say(), say()
    assert first == second or second[0]  # where a view could not be followed, more may be given up


@settings(max_examples=200, **examples)
@given(st.integers(0, 2**32))
def test_pieces_are_the_same_exactly_where_their_entries_are(seed):
    """Without products the groups are the classes of the entries that relations connect, one by one."""
    draw = random.Random(seed)
    relations = random_relations(draw, ("concatenation",))
    atoms: dict[Tree, AxisNode] = {}
    for pair in relations:
        unify(*draw.sample([planted(tree, atoms) for tree in pair], 2))
    names = {tree: number for number, tree in enumerate(atoms)}
    classes = {(number, entry): {(number, entry)} for tree, number in names.items() for entry in range(tree[1])}

    def entries(tree: Tree) -> list[tuple[int, int]]:
        if tree[0] == "leaf":
            return [(names[tree], entry) for entry in range(tree[1])]
        return [entry for part in tree[1:] for entry in entries(part)]

    for first, second in relations:
        for one, other in zip(entries(first), entries(second), strict=True):
            merged = classes[one] | classes[other]
            classes.update(dict.fromkeys(merged, merged))
    found: dict[tuple[AxisNode, int], set[tuple[int, int]]] = {}
    for number, node in enumerate(atoms.values()):
        for leaf, indices in positions(node).items():
            for group, owned in enumerate(indices.tolist()):
                found.setdefault((leaf, group), set()).update((number, entry) for entry in owned)
    assert not gave_up(atoms.values())
    assert {frozenset(group) for group in found.values()} == {frozenset(group) for group in classes.values()}


def test_what_lies_around_a_boundary_that_does_not_divide_stays_free():
    batch, heads, rows, columns, last = map(AxisNode, (5, 2, 3, 4, 7))
    aligned = align([batch, heads, rows, columns, last], [5, 2 * 4, 3, 7])
    assert [is_frozen(axis) for axis in aligned] == [False, False, True, False]
    assert [is_frozen(axis) for axis in (batch, heads, rows, columns, last)] == [False, False, True, True, False]
    first, grid, last = AxisNode(5), product((AxisNode(3), AxisNode(4))), AxisNode(7)
    pieces = cut(concatenation((first, grid, last)), [5 + 6, 6, 7])
    assert [is_frozen(axis) for axis in (*pieces, grid)] == [False, True, False, True]
    assert not is_frozen(first)
    assert not is_frozen(last)


def test_an_empty_axis_stays_empty():
    empty, other = AxisNode(0), AxisNode(4)
    assert [axis.size for axis in align([empty, other], [4, 0, 2])] == [4, 0, 2]
    assert is_frozen(other)
    assert [axis.size for axis in cut(AxisNode(0), [0, 0])] == [0, 0]


def test_a_residual_stream_and_pieces_of_pieces_may_be_as_long_as_a_model_is_deep():
    count = 3000  # beyond Python's limit on recursion
    stream = AxisNode(8)
    for _ in range(count):
        update = AxisNode(8)
        unify(update, stream)
        freeze(stream, WHY)
        stream = update
    assert reasons(stream) == (WHY,)

    whole, twin, dense = AxisNode(count), AxisNode(count), AxisNode(2)
    for axis in (whole, twin):
        rest = axis
        for size in range(count, 1, -1):
            _, rest = cut(rest, (1, size - 1))
    unify(whole, twin)
    assert len(list(leaves(whole))) == size_after(twin, {}) == len(positions(twin)) == count
    for _ in range(count):
        dense = concatenation((dense, AxisNode(2)))
    unify(dense, AxisNode(dense.size))
    assert not is_frozen(dense)
    assert find(cut(dense, (2, dense.size - 2))[0]).size == 2


@settings(max_examples=20, **examples)
@given(st.integers(0, 2**32))
def test_a_random_module_without_the_groups_computes_what_it_computes_with_zeros(seed):
    draw = random.Random(seed)
    model = ProgramModule(Grower(draw).program, seed)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
    qadg = build_qadg(model, {"x": x}, verify=False)  # the rules alone: nothing that fails is frozen afterwards
    removed = {axis.name: draw.sample(range(axis.size), max(1, int(0.4 * axis.size))) for axis in qadg.axes}
    small = qadg.prune(model, removed)
    zeroed = copy.deepcopy(model)
    qadg.zero_(zeroed, removed)
    for axis in qadg.axes:
        for member in axis.members:
            assert member.indices.unique().numel() == member.indices.numel()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters()) or not removed
    with torch.no_grad():
        torch.testing.assert_close(small(x), zeroed(x), rtol=1e-4, atol=1e-4)  # sums in another order
