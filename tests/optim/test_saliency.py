"""The choice of groups: exact in number, never an axis's last ones, the same every time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.optim.saliency import choose_least_salient, normalize_by_kind, removable_groups


@st.composite
def spaces(draw):
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return sizes, torch.rand(sum(sizes), generator=generator)


@given(spaces(), st.floats(0, 1))
def test_exactly_the_asked_number_is_chosen_and_no_axis_is_emptied(space, share):
    sizes, scores = space
    count = int(share * (sum(sizes) - len(sizes)))
    chosen = choose_least_salient(scores, torch.zeros(sum(sizes), dtype=torch.bool), count, sizes)
    assert chosen.sum() == count
    assert all((~part).sum() >= 1 for part in chosen.split(sizes))


@given(spaces(), st.integers(1, 4))
def test_choosing_in_periods_chooses_what_one_choice_does(space, periods):
    """With unchanged scores, P periods remove the same groups as one."""
    sizes, scores = space
    total = (sum(sizes) - len(sizes)) // 2
    removed = torch.zeros(sum(sizes), dtype=torch.bool)
    for period in range(periods):
        removed |= choose_least_salient(scores, removed, total * (period + 1) // periods, sizes)
    at_once = choose_least_salient(scores, torch.zeros_like(removed), total, sizes)
    assert torch.equal(removed, at_once)


@given(spaces(), st.sampled_from([2, 4, 8]), st.integers(1, 3))
def test_kept_sizes_are_multiples_of_what_hardware_likes(space, divisible, periods):
    sizes, scores = space
    blocks = [sum(removable_groups(size, 1, divisible)) for size in sizes]
    total, removed = sum(blocks) // 2, torch.zeros(sum(sizes), dtype=torch.bool)
    for period in range(periods):
        chosen = choose_least_salient(scores, removed, total * (period + 1) // periods, sizes, divisible=divisible)
        assert not (chosen & removed).any()
        removed |= chosen
    assert total - divisible < removed.sum() <= total
    for size, part in zip(sizes, removed.split(sizes), strict=True):
        kept = size - int(part.sum())
        assert kept == size or size <= divisible or kept % divisible == 0


def test_the_least_salient_go_first_and_ties_go_to_the_lower_number():
    scores = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])
    chosen = choose_least_salient(scores, torch.zeros(5, dtype=torch.bool), 2, [5])
    assert chosen.nonzero().flatten().tolist() == [1, 2]


def test_min_groups_stay():
    scores = torch.tensor([0.0, 0.1, 0.2, 9.0, 9.1, 9.2])
    chosen = choose_least_salient(scores, torch.zeros(6, dtype=torch.bool), 2, [3, 3], min_groups=2)
    assert chosen.split([3, 3])[0].sum() == 1
    assert chosen.split([3, 3])[1].sum() == 1


def test_normalization_makes_kinds_comparable():
    scores = torch.tensor([100.0, 300.0, 1.0, 3.0])
    assert normalize_by_kind(scores, ["head", "mlp"], [2, 2]).tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])
