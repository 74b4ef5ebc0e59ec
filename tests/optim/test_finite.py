"""Gradients that hold NaN or inf: nothing of their step is taken, and a run of nothing else ends."""

import pytest
import torch

from hf_geta import create_optimizer, finalize_model
from hf_geta.optim.finite import MOST_SKIPPED_IN_A_ROW, are_finite, refuse_not_finite
from tests.optim.test_qasso import OPTIMIZERS, TOTAL_STEPS, batch, prepared, train


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_one_entry_is_enough(value, dtype):
    tensors = [torch.ones(3, 4, dtype=dtype), torch.ones(5)]
    assert are_finite(tensors)
    tensors[0][1, 2] = value
    assert not are_finite(tensors)


def test_what_overflows_only_when_it_is_squared_is_finite():
    assert are_finite([torch.full((2,), 3e38), torch.zeros(0)])
    assert are_finite([torch.full((2,), 6e4, dtype=torch.float16)])
    assert are_finite([])


def broken_step(model, optimizer, step, value):
    model(**batch(step)).loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    parameters[step % len(parameters)].grad.view(-1)[0] = value
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_broken_step_in_any_stage_leaves_no_trace(name, caplog):
    """A run with broken steps between its own ends, bit for bit, as the one without."""
    runs = []
    for broken in ((), (2, 9, 20, 21, 30, 45)):  # in all four stages, two of them in a row
        model = prepared()
        optimizer = create_optimizer(model, OPTIMIZERS[name](model.parameters()), TOTAL_STEPS)
        for step in train(model, optimizer, range(TOTAL_STEPS)):
            if step in broken:
                bits = optimizer.widths.bits()
                broken_step(model, optimizer, step, float("nan") if step % 2 else float("inf"))
                assert torch.equal(optimizer.widths.bits(), bits)
        assert optimizer.step_count == TOTAL_STEPS
        runs.append(model.state_dict())
    assert [key for key in runs[0] if not torch.equal(runs[0][key], runs[1][key])] == []
    assert "NaN or inf" in caplog.text


def test_a_step_without_any_gradient_is_refused():
    """Groups would go by their numbers: nothing was said of them."""
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    model(**batch(0)).loss.backward()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"call step\(\) after backward\(\) and before zero_grad\(\)"):
        optimizer.step()


def test_a_run_of_broken_steps_ends_with_what_to_do():
    model = prepared()
    optimizer = create_optimizer(model, OPTIMIZERS["adamw"](model.parameters()), TOTAL_STEPS)
    for _ in range(MOST_SKIPPED_IN_A_ROW - 1):
        broken_step(model, optimizer, 0, float("nan"))
    for _ in train(model, optimizer, range(1)):  # a good one between: counted anew
        pass
    for _ in range(MOST_SKIPPED_IN_A_ROW - 1):
        broken_step(model, optimizer, 0, float("nan"))
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        broken_step(model, optimizer, 0, float("nan"))


def test_a_broken_model_is_not_saved_and_told_by_name():
    model = prepared()
    refuse_not_finite(model)
    with torch.no_grad():
        model.classifier.bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"in classifier\.bias:"):
        finalize_model(model)
