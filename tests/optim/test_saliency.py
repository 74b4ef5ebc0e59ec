"""Scores: what makes groups of different kinds comparable."""

import pytest
import torch

from hf_geta.config_checks import MIXED_SALIENCIES, SALIENCIES
from hf_geta.optim.saliency import GROWTH, REMEMBERED_STEPS, mean_size_by_kind, memory, mix, observe, observed_kinds
from hf_geta.optim.schedule import Schedule


def test_kinds_rank_by_what_an_entry_costs_and_groups_of_a_kind_by_what_they_cost():
    """Two heads of 100 entries, two hidden units of 1 and 3: of all, a head costs most and an entry of it least."""
    kind_sizes = mean_size_by_kind(torch.tensor([100.0, 100.0, 1.0, 3.0]), ["head", "mlp"], [2, 2])
    assert kind_sizes.tolist() == [100, 100, 2, 2]
    for name in ("taylor", "fisher"):
        ranking = mix({name: torch.tensor([90.0, 210.0, 2.0, 2.1])}, {name: 1.0}, kind_sizes)
        assert ranking.argsort().tolist() == [0, 2, 3, 1]
    ranking = mix({"magnitude": torch.tensor([9.0, 11.0, 1.3, 1.5])}, {"magnitude": 1.0}, kind_sizes)
    assert ranking.argsort().tolist() == [0, 2, 3, 1]


KIND_SIZES = torch.tensor([9.0] * 3 + [2.0] * 5)


def per_entry(scores, name):
    value = scores[name] / KIND_SIZES ** GROWTH[name]
    return value / value.mean()


def random_scores():
    draw = torch.Generator().manual_seed(0)
    return {name: torch.rand(8, generator=draw) ** 2 for name in MIXED_SALIENCIES}


@pytest.mark.parametrize("name", MIXED_SALIENCIES)
def test_a_mix_of_one_is_that_one(name):
    scores = random_scores()
    weights = dict.fromkeys(MIXED_SALIENCIES, 0) | {name: 7}
    assert torch.equal(mix(scores, weights, KIND_SIZES), per_entry(scores, name))


def test_a_mix_does_not_depend_on_the_units_of_its_parts():
    scores = random_scores()
    scaled = {name: scores[name] * factor for name, factor in zip(scores, (1e-6, 1.0, 1e4), strict=True)}
    weights = dict(zip(scores, (1, 2, 3), strict=True))
    assert torch.allclose(mix(scores, weights, KIND_SIZES), mix(scaled, weights, KIND_SIZES))


def test_a_mix_is_the_weighted_mean_of_its_normalized_parts():
    scores = random_scores()
    expected = sum(
        weight / 4 * per_entry(scores, name) for name, weight in zip(MIXED_SALIENCIES, (1, 1, 2), strict=True)
    )
    assert torch.allclose(mix(scores, dict(zip(MIXED_SALIENCIES, (1, 1, 2), strict=True)), KIND_SIZES), expected)


def test_a_step_adds_the_size_of_its_first_order_term_and_its_square():
    first_order = torch.tensor([-2.0, 3.0])
    assert observe(first_order, ["taylor", "fisher"]).tolist() == [[2.0, 3.0], [4.0, 9.0]]
    assert [observed_kinds(kind) for kind in SALIENCIES] == [[], ["taylor"], ["fisher"], ["taylor", "fisher"]]


def test_a_batch_that_overflowed_adds_nothing():
    first_order = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    assert observe(first_order, ["taylor", "fisher"])[0].tolist() == [0.0, 0.0, 0.0, pytest.approx(1e30)]
    assert observe(first_order, ["taylor", "fisher"])[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_space_without_groups_has_no_scores():
    sizes = mean_size_by_kind(torch.zeros(0), [], [])
    assert mix({"fisher": torch.zeros(0)}, {"fisher": 1.0}, sizes).shape == (0,)


@pytest.mark.parametrize("period_steps", [1, 3, 10, REMEMBERED_STEPS, 500])
def test_decisions_see_a_period_or_the_steps_that_are_remembered_whichever_are_more(period_steps):
    joint = Schedule(10_000, 0, 0, 10 * period_steps, 10, initial_bits=16, bit_reduction=2)
    seen = 0.0
    for _ in range(1000):
        seen = seen * memory(joint) + period_steps
    assert seen == pytest.approx(max(period_steps, REMEMBERED_STEPS))
