"""Scores: what makes groups of different kinds comparable."""

import pytest
import torch

from hf_geta.config_checks import MIXED_SALIENCIES, SALIENCIES
from hf_geta.optim.saliency import REMEMBERED_STEPS, memory, mix, normalize_by_kind, observe, observed_kinds
from hf_geta.optim.schedule import Schedule


def test_normalization_makes_kinds_comparable():
    scores = torch.tensor([100.0, 300.0, 1.0, 3.0])
    assert normalize_by_kind(scores, ["head", "mlp"], [2, 2]).tolist() == pytest.approx([0.5, 1.5, 0.5, 1.5])


KINDS, SIZES = ["head", "mlp"], [3, 5]


def random_scores():
    draw = torch.Generator().manual_seed(0)
    return {name: torch.rand(8, generator=draw) ** 2 for name in MIXED_SALIENCIES}


@pytest.mark.parametrize("name", MIXED_SALIENCIES)
def test_a_mix_of_one_is_that_one(name):
    scores = random_scores()
    weights = dict.fromkeys(MIXED_SALIENCIES, 0) | {name: 7}
    assert torch.equal(mix(scores, weights, KINDS, SIZES), normalize_by_kind(scores[name], KINDS, SIZES))


def test_a_mix_does_not_depend_on_the_units_of_its_parts():
    scores = random_scores()
    scaled = {name: scores[name] * factor for name, factor in zip(scores, (1e-6, 1.0, 1e4), strict=True)}
    weights = dict(zip(scores, (1, 2, 3), strict=True))
    assert torch.allclose(mix(scores, weights, KINDS, SIZES), mix(scaled, weights, KINDS, SIZES))


def test_a_mix_is_the_weighted_mean_of_its_normalized_parts():
    scores = random_scores()
    expected = sum(
        weight / 4 * normalize_by_kind(scores[name], KINDS, SIZES)
        for name, weight in zip(MIXED_SALIENCIES, (1, 1, 2), strict=True)
    )
    assert torch.allclose(mix(scores, dict(zip(MIXED_SALIENCIES, (1, 1, 2), strict=True)), KINDS, SIZES), expected)


def test_a_step_adds_the_size_of_its_first_order_term_and_its_square():
    first_order = torch.tensor([-2.0, 3.0])
    assert observe(first_order, ["taylor", "fisher"]).tolist() == [[2.0, 3.0], [4.0, 9.0]]
    assert [observed_kinds(kind) for kind in SALIENCIES] == [[], ["taylor"], ["fisher"], ["taylor", "fisher"]]


def test_a_batch_that_overflowed_adds_nothing():
    first_order = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    assert observe(first_order, ["taylor", "fisher"])[0].tolist() == [0.0, 0.0, 0.0, pytest.approx(1e30)]
    assert observe(first_order, ["taylor", "fisher"])[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_space_without_groups_has_no_scores():
    assert normalize_by_kind(torch.zeros(0), [], []).shape == (0,)


@pytest.mark.parametrize("period_steps", [1, 3, 10, REMEMBERED_STEPS, 500])
def test_decisions_see_a_period_or_the_steps_that_are_remembered_whichever_are_more(period_steps):
    joint = Schedule(10_000, 0, 0, 10 * period_steps, 10, initial_bits=16, bit_reduction=2)
    seen = 0.0
    for _ in range(1000):
        seen = seen * memory(joint) + period_steps
    assert seen == pytest.approx(max(period_steps, REMEMBERED_STEPS))
