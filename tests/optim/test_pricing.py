"""Budgets on a real (tiny) vision transformer: the cost model, whole runs, and what bits and channels trade."""

import dataclasses
import io
import itertools
import logging
import random
import re

import pytest
import torch

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model
from hf_geta.measure import measure_compression, output_difference
from hf_geta.optim.schedule import Stage
from tests.optim.test_qasso import OPTIMIZERS, TOTAL_STEPS, batch, tiny_vit, train, weight_rows

BUDGET = GETAConfig(target_bops=0.01, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=4)


def prepared(config):
    return prepare_model(tiny_vit().train(), config, {"pixel_values": batch(0)["pixel_values"]})


def started(config):
    model = prepared(config)
    return model, create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)


def axis_counts(qadg, removed):
    return [len(removed.get(axis.name, ())) for axis in qadg.axes]


@pytest.mark.parametrize("seed", range(3))
def test_the_budgets_cost_is_that_of_the_report(seed):
    model, optimizer = started(BUDGET)
    rng, qadg = random.Random(seed), model.geta.qadg
    removed = {axis.name: rng.sample(range(axis.size), rng.randrange(axis.size)) for axis in qadg.axes}
    bits = torch.tensor([float(rng.randint(2, 8)) for _ in optimizer.widths.quantizers])
    qadg.zero_(model, removed)
    optimizer.widths.project_(bits, bits)
    cost = optimizer.targets.budget.cost(axis_counts(qadg, removed), bits.tolist())
    # widths are read back from float32 logarithms
    assert cost == pytest.approx(measure_compression(model).relative_bops, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"group_sparsity": 0},
        {"group_sparsity": 0.3},
        {"weight_bits": [2, 4, 8], "group_divisible": 8},
        {"granularity": "channel", "target_bops": 0.03},
        {"weight_bits": None, "activation_bits": None, "target_bops": 0.5},
        {"without": ["joint_rule"]},
    ],
    ids=str,
)
def test_a_run_ends_at_its_budget_within_one_move_with_every_width_in_range_at_every_step(changes):
    config = GETAConfig.from_dict(BUDGET.to_dict() | changes)
    model, optimizer = started(config)
    for step in train(model, optimizer, range(TOTAL_STEPS)):
        if optimizer.schedule.stage_at(step) is Stage.WARMUP or config.weight_bits is None:
            continue
        bits = optimizer.widths.bits()
        assert bits.min() >= 2 - 1e-4
        for row, allowed in enumerate(optimizer.allowed_bits):  # comes down as without a budget
            assert bits[row] <= optimizer.schedule.upper_bits_at(step, allowed[-1]) + 1e-4
    cost = measure_compression(model)
    assert cost.relative_bops <= config.target_bops * (1 + 1e-6)
    assert optimizer.targets.cost == pytest.approx(cost.relative_bops, rel=1e-6)
    assert int(optimizer.removed.sum()) == optimizer.groups_to_remove
    if config.group_sparsity is not None:
        assert cost.group_sparsity <= config.group_sparsity + 1e-9
    budget, removed = optimizer.targets.budget, axis_counts(model.geta.qadg, model.geta.qadg.zero_groups(model))
    final = [] if optimizer.final_bits is None else [int(b) for b in optimizer.final_bits]
    for row, allowed in enumerate(optimizer.targets.allowed_bits):  # no width can be raised
        assert final[row] in allowed
        if final[row] < allowed[-1]:
            wider = list(final)
            wider[row] = allowed[allowed.index(final[row]) + 1]
            assert budget.cost(removed, wider) > config.target_bops
    if config.weight_bits is None:  # nor could the group that went last have stayed
        fewer = [[*removed[:axis], n - 1, *removed[axis + 1 :]] for axis, n in enumerate(removed) if n]
        assert max(budget.cost(counts, final) for counts in fewer) > config.target_bops


@pytest.mark.parametrize(
    "grid", [{"granularity": "tensor"}, {"granularity": "channel"}, {"granularity": "block", "weight_block_size": 16}]
)
def test_the_weight_file_is_not_larger_than_its_budget(grid, tmp_path):
    dense = sum(p.numel() for p in tiny_vit().parameters()) * 4
    config = GETAConfig(target_size=str(dense * 3 // 4), weight_bits=[2, 8], pruning_periods=4)
    config = dataclasses.replace(config, activation_bits=(4, 8), **grid)
    model, optimizer = started(config)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    finalize_model(model).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    # as priced, but for the header, for which the most that it may take was put by
    assert optimizer.targets.cost - optimizer.targets.budget.constant < size <= optimizer.targets.cost
    assert optimizer.targets.cost <= config.target_size_bytes


@pytest.mark.parametrize("stop", [14, 21, 30, 40])
def test_a_resumed_run_has_the_widths_and_groups_of_the_uninterrupted_one(stop):
    model, optimizer = started(BUDGET)
    list(train(model, optimizer, range(stop)))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    list(train(model, optimizer, range(stop, TOTAL_STEPS)))
    resumed, second = started(BUDGET)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    list(train(resumed, second, range(stop, TOTAL_STEPS)))
    assert torch.equal(optimizer.final_bits, second.final_bits)
    assert torch.equal(optimizer.removed, second.removed)
    assert optimizer.targets.price == second.targets.price > 0
    for (name, p), q in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def observed(config):
    """A pricing that has watched a real model train up to its first decision, and the scores for it."""
    model, optimizer = started(config)
    first = optimizer.schedule.warmup_steps + optimizer.schedule.projection_steps
    list(train(model, optimizer, range(first)))
    return optimizer.targets, optimizer.targets.scores.clone(), optimizer.targets.sensitivity.clone()


def decide(pricing, scores, sensitivity, removed=None, allowed=None):
    """Groups chosen, (num_groups,), and widths, for the whole budget at once."""
    pricing.sensitivity, pricing.scores = sensitivity.clone(), scores.clone()
    pricing.config = dataclasses.replace(pricing.config, pruning_periods=1)
    pricing.allowed_bits = allowed or pricing.allowed_bits
    removed = torch.zeros(len(scores), dtype=torch.bool) if removed is None else removed
    return pricing.decide(0, removed), pricing.ceilings


def test_groups_go_evenly_over_the_periods_and_widths_come_down_to_those_that_the_last_one_leaves():
    """Also where widths alone would meet the cost of the first periods."""
    pricing, scores, sensitivity = observed(dataclasses.replace(BUDGET, target_bops=0.01))
    plan, final = decide(pricing, scores, sensitivity)
    periods = 5
    pricing.config = dataclasses.replace(pricing.config, pruning_periods=periods)
    removed, counts, widths = torch.zeros(len(scores), dtype=torch.bool), [], []
    for period in range(periods):
        pricing.sensitivity, pricing.scores = sensitivity.clone(), scores.clone()
        chosen = pricing.decide(period, removed)
        assert not (chosen & removed).any()
        removed |= chosen
        counts.append(int(chosen.sum()))
        widths.append(pricing.ceilings.clone())
    assert sum(counts) == plan.sum() >= 10
    assert max(counts) - min(counts) <= 1
    assert torch.equal(widths[-1], final)
    assert all((wider >= narrower).all() for wider, narrower in itertools.pairwise(widths))
    assert widths[0].sum() > final.sum()


def hidden_axis(pricing):
    """(first group, size) of the first MLP axis."""
    place = next(i for i, kind in enumerate(pricing.space.axis_kinds) if "mlp" in kind or "hidden" in kind)
    return sum(pricing.space.axis_sizes[:place]), pricing.space.axis_sizes[place], place


def layers_of(pricing, axis):
    """Rows of the weight quantizers of the layers that an axis runs through."""
    rows = {term.quantizers[0] for term in pricing.budget.terms if any(axis == a for dim in term.dims for a, _ in dim)}
    return sorted(rows)


def test_forcing_fewer_channels_in_a_layer_raises_its_widths():
    config = dataclasses.replace(BUDGET, target_bops=0.02)
    pricing, scores, sensitivity = observed(config)
    start, size, axis = hidden_axis(pricing)
    pricing.most_removed = 0  # widths alone answer
    _, free = decide(pricing, scores, sensitivity)
    forced = torch.zeros(len(scores), dtype=torch.bool)
    forced[start : start + size * 2 // 3] = True
    pricing.most_removed = int(forced.sum())
    _, kept = decide(pricing, scores, sensitivity, removed=forced)
    rows = layers_of(pricing, axis)
    assert kept[rows].sum() > free[rows].sum()


def test_forcing_fewer_bits_in_a_layer_keeps_more_of_its_channels():
    # a budget that leaves the axis a choice: at 0.006 all that may go of it goes either way
    pricing, scores, sensitivity = observed(dataclasses.replace(BUDGET, target_bops=0.01))
    start, size, axis = hidden_axis(pricing)
    chosen, _ = decide(pricing, scores, sensitivity)
    rows = layers_of(pricing, axis)
    allowed = [(2,) if row in rows else bits for row, bits in enumerate(pricing.allowed_bits)]
    pricing.start = pricing.budget.cost([0] * len(pricing.space.axis_sizes), [bits[-1] for bits in allowed])
    with_few_bits, _ = decide(pricing, scores, sensitivity, allowed=allowed)
    assert with_few_bits[start : start + size].sum() < chosen[start : start + size].sum()


@pytest.mark.parametrize("divisible", [1, 8, 12])
def test_a_cap_on_groups_is_spent_where_it_saves_enough(divisible):
    """The cheap groups of a cheap layer would use up the cap and leave the budget out of reach."""
    config = dataclasses.replace(BUDGET, weight_bits=(8, 8), activation_bits=(8, 8), target_bops=0.05)
    _, optimizer = started(dataclasses.replace(config, group_divisible=divisible))
    pricing = optimizer.targets
    sizes, kinds = pricing.space.axis_sizes, pricing.space.axis_kinds
    cheap = [axis for axis, kind in enumerate(kinds) if kind == "attention_head"]
    rises = torch.cat([torch.full((size,), 1e-6 if axis in cheap else 1.0) for axis, size in enumerate(sizes)])
    for cap in (8, 16, 20, 24):
        pricing.most_removed = cap
        everything = torch.zeros(len(rises), dtype=torch.bool)
        best = pricing._solve(
            dataclasses.replace(pricing.budget, target=0.0),
            [1.0] * len(rises),
            [{width: 2.0**-width for width in bits} for bits in pricing.allowed_bits],
            everything,
            cap,
        )
        pricing.budget = dataclasses.replace(pricing.budget, target=best.cost * 1.001)
        decide(pricing, rises, torch.ones(len(pricing.allowed_bits)))
        assert pricing.cost <= pricing.budget.target


BYTES = {"target_bops": None, "target_size": "1KB"}


def test_a_budget_out_of_reach_is_refused_by_its_field_with_what_is_left_in_its_unit():
    with pytest.raises(ValueError, match=r"^target_bops=1e-05 cannot be met: .*, about 0\.\d+ is left"):
        started(dataclasses.replace(BUDGET, target_bops=1e-5))
    with pytest.raises(ValueError, match="lower weight_bits, write quantize_embeddings=8 where there are token embedd"):
        started(dataclasses.replace(BUDGET, **BYTES))
    with pytest.raises(ValueError, match=r"^target_size='1KB' \(1,000 bytes\) cannot be met: .* \d+,\d+ bytes is left"):
        started(dataclasses.replace(BUDGET, **BYTES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_bops": 0.5}, r"^target_bops=0\.5 asks for nothing: .*, 0\.0625 is left"),
        (BYTES | {"target_size": "1GB"}, r"^target_size='1GB' \(1,000,000,000 bytes\) .*, \d+,\d+ bytes is left"),
    ],
)
def test_a_budget_that_asks_for_nothing_is_told(changes, message, caplog):
    with caplog.at_level(logging.WARNING, "hf_geta.optim.pricing"):
        started(dataclasses.replace(BUDGET, **changes))
        assert re.search(message, caplog.messages[-1])
        caplog.clear()
        started(BUDGET)
    assert not caplog.messages


@pytest.mark.parametrize("part", ["projection", "qadg"])
def test_an_ablation_leaves_out_its_part_and_nothing_else(part):
    config = GETAConfig(group_sparsity=0.3, weight_bits=[2, 4], activation_bits=[8, 8], pruning_periods=4, without=part)
    model, optimizer = started(config)
    list(train(model, optimizer, range(TOTAL_STEPS)))
    assert optimizer.removed.sum() == optimizer.groups_to_remove > 0
    bits = optimizer.final_bits[weight_rows(optimizer)]
    assert (bits.max() > 4) == (part == "projection")
    assert all(axis.name.endswith(".rows") for axis in model.geta.qadg.axes) == (part == "qadg")
    cost = measure_compression(model)
    assert (cost.parameters == cost.dense_parameters) == (part == "qadg")  # whose zeros stay in the file
    # summing fewer zeros may flip the rounding of an activation, by one step of 8 bits
    assert output_difference(model, finalize_model(model), {"pixel_values": batch(7)["pixel_values"]}) < 0.01


@pytest.mark.parametrize("without", [[], ["joint_rule"]])
def test_without_the_joint_rule_entries_are_forgotten_at_a_constant_rate_whatever_the_gradient_says(without):
    config = GETAConfig(group_sparsity=0.5, weight_bits=[2, 4], pruning_periods=2, without=without)
    model = prepared(config)
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.0), TOTAL_STEPS)
    first = optimizer.schedule.warmup_steps + optimizer.schedule.projection_steps
    list(train(model, optimizer, range(first)))
    before = [p.detach().clone() for p in optimizer.space.parameters]
    list(train(model, optimizer, [first]))
    left = optimizer.schedule.pruning_period_at(first).length_steps
    owned = optimizer.space.owned_positions(optimizer.redundant)
    start = {p.data_ptr(): value for p, value in zip(optimizer.space.parameters, before, strict=True)}
    shares = [
        p.index_select(dim, at) / start[p.data_ptr()].index_select(dim, at) for p, dim, at in owned if p.dim() == 2
    ]
    constant = all(torch.allclose(share, torch.full_like(share, 1 - 1 / left), atol=1e-5) for share in shares)
    assert constant == bool(without)
