"""The search space in numbers says the same as the axes in words."""

import torch
from torch import nn

from hf_geta.graph.qadg import Axis, Member
from hf_geta.optim.space import PruningSpace


def two_axes():
    """A matrix whose rows belong to one axis (pairs of rows) and whose columns to another, and a bias."""
    weight, bias = nn.Parameter(torch.arange(1.0, 13).view(4, 3)), nn.Parameter(torch.ones(4))
    rows = torch.tensor([[0, 1], [2, 3]])
    axes = [
        Axis("heads", "attention_head", 2, (Member("w", 0, rows), Member("b", 0, rows))),
        Axis("units", "mlp", 3, (Member("w", 1, torch.tensor([[0], [1], [2]])), Member("absent", 0, rows))),
    ]
    return PruningSpace(axes, {"w": weight, "b": bias}), weight


def test_sums_per_group_are_those_of_its_slices():
    space, weight = two_axes()
    sums = space.sum_per_group(lambda p: p.detach())
    expected = [weight[:2].sum() + 2, weight[2:].sum() + 2, *weight.sum(dim=0)]
    assert torch.allclose(sums, torch.stack([torch.as_tensor(e) for e in expected]).detach())


def test_entries_of_overlapping_groups_are_gathered_once():
    space, _ = two_axes()
    entries = space.entries(torch.tensor([True, False, False, True, False]))
    chosen = torch.zeros(4, 3, dtype=torch.bool)
    chosen[:2] = True
    chosen[:, 1] = True
    index = dict(zip(entries.parameters, entries.indices, strict=True))[0]
    assert index.tolist() == chosen.flatten().nonzero().flatten().tolist()


def test_owned_positions_cover_exactly_the_members():
    space, weight = two_axes()
    owned = space.owned_positions(torch.tensor([False, True, False, False, True]))
    found = {
        (("w" if p.data_ptr() == weight.data_ptr() else "b"), dim): positions.tolist() for p, dim, positions in owned
    }
    assert found == {("w", 0): [2, 3], ("b", 0): [2, 3], ("w", 1): [2]}


def test_no_group_owns_nothing():
    space, _ = two_axes()
    none = torch.zeros(5, dtype=torch.bool)
    assert space.owned_positions(none) == []
    assert space.entries(none).parameters == []
