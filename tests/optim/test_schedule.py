"""The timetable: what holds at every step of every run."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_geta import GETAConfig
from hf_geta.optim.schedule import Schedule, Stage


@st.composite
def schedules(draw):
    """A schedule that fits, with the upper bounds it serves."""
    upper = draw(st.integers(2, 16))
    config = GETAConfig(
        weight_bits=[2, upper],
        bit_reduction=draw(st.integers(1, 5)),
        warmup_steps=draw(st.integers(1, 20)),
        projection_steps=draw(st.integers(14, 40)),
        joint_steps=draw(st.integers(10, 60)),
        pruning_periods=draw(st.integers(1, 10)),
    )
    return Schedule.from_config(config, draw(st.integers(121, 300))), upper


@given(schedules())
def test_stages_follow_each_other_and_fill_the_run(drawn):
    schedule, _ = drawn
    stages = [schedule.stage_at(step) for step in range(schedule.total_steps)]
    assert stages == sorted(stages)
    assert stages.count(Stage.WARMUP) == schedule.warmup_steps
    assert stages.count(Stage.PROJECTION) == schedule.projection_steps
    assert stages.count(Stage.JOINT) == schedule.joint_steps
    assert stages[-1] is Stage.COOLDOWN


@given(schedules())
def test_the_upper_bound_never_rises_and_reaches_its_target_with_the_last_projection_period(drawn):
    schedule, upper = drawn
    bounds = [schedule.upper_bits_at(step, upper) for step in range(schedule.total_steps)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[schedule.warmup_steps + schedule.projection_steps - 1] == upper
    falls = [a - b for a, b in itertools.pairwise(bounds)]
    assert max(falls) <= schedule.bit_reduction


@given(schedules(), st.integers(0, 10_000))
def test_pruning_periods_cut_the_joint_stage_and_end_at_exactly_the_asked_number(drawn, removed):
    schedule, _ = drawn
    first = schedule.warmup_steps + schedule.projection_steps
    periods = [schedule.pruning_period_at(step) for step in range(first, first + schedule.joint_steps)]
    assert [p.index for p in periods if p.is_first_step] == list(range(schedule.pruning_periods))
    assert [p.index for p in periods if p.is_last_step] == list(range(schedule.pruning_periods))
    assert sum(p.length_steps for p in periods if p.is_first_step) == schedule.joint_steps
    for before, after in itertools.pairwise(periods):
        assert after.offset_steps == (0 if after.index != before.index else before.offset_steps + 1)
    counts = [schedule.redundant_count(p.index, removed) for p in periods]
    assert counts == sorted(counts)
    assert counts[-1] == removed


@given(st.integers(30, 300), st.integers(30, 300), st.data())
def test_a_run_that_goes_on_with_another_length_prunes_every_period_once_or_is_refused(length, other, data):
    config = GETAConfig(pruning_periods=3)
    began, planned = (Schedule.from_config(config, total_steps) for total_steps in (length, other))
    at = data.draw(st.integers(0, length))
    if other <= at:
        assert planned.resumed(at, began) == began  # no step is left: what is said of the run stays true
        return
    if at > min(began.first_joint_step, planned.first_joint_step) and began.first_cooldown_step >= other:
        with pytest.raises(ValueError, match=rf"step {at} of {length} planned .* with {other}: .* more steps"):
            planned.resumed(at, began)
        return
    resumed = planned.resumed(at, began)
    assert resumed.total_steps == other
    schedules = [began] * at + [resumed] * (other - at)
    joint = [(step, by) for step, by in enumerate(schedules) if by.stage_at(step) is Stage.JOINT]
    periods = [by.pruning_period_at(step) for step, by in joint]
    assert [period.index for period in periods if period.is_first_step] == [0, 1, 2]
    assert [period.index for period in periods if period.is_last_step] == [0, 1, 2]
    assert resumed.stage_at(other - 1) is Stage.COOLDOWN


def test_a_run_of_the_same_length_goes_on_as_it_was_planned():
    schedule = Schedule.from_config(GETAConfig(), 100)
    assert {schedule.resumed(step, schedule) for step in range(101)} == {schedule}


def test_shares_become_steps_of_the_run():
    schedule = Schedule.from_config(GETAConfig(warmup_steps=0.1, projection_steps=0.2, joint_steps=0.3), 1000)
    assert (schedule.warmup_steps, schedule.projection_steps, schedule.joint_steps) == (100, 200, 300)


@pytest.mark.parametrize(
    ("values", "total_steps", "message"),
    [
        ({"warmup_steps": 0.5, "projection_steps": 0.3, "joint_steps": 0.2}, 100, "leave none for the cool-down"),
        ({"warmup_steps": 50, "projection_steps": 40, "joint_steps": 30}, 100, "take 120 of the run's 100"),
        ({"joint_steps": 5, "pruning_periods": 6}, 100, "pruning_periods=6 do not fit the 5 steps"),
        ({"projection_steps": 3}, 100, "takes 4 periods, more than the 3 steps"),
        ({"projection_steps": 5, "activation_bits": [2, 4]}, 100, "activation_bits=.*takes 6 periods"),
        ({"projection_steps": 4, "weight_bits": [2, 4, 6]}, 100, "down to 6 by bit_reduction=2 takes 5 periods"),
    ],
)
def test_a_run_that_cannot_reach_its_targets_is_refused(values, total_steps, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(GETAConfig(**values), total_steps)
