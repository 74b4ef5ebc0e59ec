"""Real steps of the joint stage: forgetting ascends in no tensor where the base optimizer descends, each by itself."""

import copy

import pytest
import torch

from hf_geta import GETAConfig, create_optimizer
from hf_geta.optim import qasso
from tests.optim.test_qasso import CONFIG, OPTIMIZERS, batch, prepared, train

STAGES = {"warmup_steps": 5, "projection_steps": 10, "joint_steps": 30}
FIRST_JOINT_STEP, FIRST_COOLDOWN_STEP, TOTAL_STEPS = 15, 45, 50
WITH_DECAY = {"sgd_with_decay": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1)}
GRIDS = [("adamw", "tensor"), ("sgd", "channel"), ("sgd_with_decay", "block")]
step_and_forget_ = qasso.step_and_forget_


def started(name, granularity):
    changes = STAGES | {"pruning_periods": 3, "granularity": granularity}
    model = prepared(GETAConfig.from_dict(CONFIG.to_dict() | changes))
    return model, create_optimizer(model, (OPTIMIZERS | WITH_DECAY)[name](model.parameters()), TOTAL_STEPS)


def first_order_effects(base, entries, *rest):
    """Takes a step. Per tensor: <g, s> of the base step s, <g, change> of the whole step, and |g| |change|."""
    (chunk,) = entries.chunks
    before, gradient, after_base = chunk.gather(), chunk.gather_gradients().double(), []
    hook = base.register_step_post_hook(lambda *_: after_base.append(chunk.gather()))
    step_and_forget_(base, entries, *rest)
    hook.remove()
    changes = [after.double() - before.double() for after in (*after_base, chunk.gather())]
    for g, step, change in zip(*(values.split(chunk.sizes) for values in (gradient, *changes)), strict=True):
        yield (g * step).sum(), (g * change).sum(), g.norm() * change.norm()


@pytest.mark.parametrize(("name", "granularity"), GRIDS)
def test_no_tensor_ascends_by_forgetting_where_its_base_step_descends(name, granularity, monkeypatch):
    effects = []
    monkeypatch.setattr(qasso, "step_and_forget_", lambda *args: effects.extend(first_order_effects(*args)))
    list(train(*started(name, granularity), range(FIRST_COOLDOWN_STEP)))
    descents = [(change, scale) for step, change, scale in effects if step < 0]
    assert len(descents) > 100
    assert all(change < 1e-6 * scale for change, scale in descents)  # entries are float32


@pytest.mark.parametrize(("name", "granularity"), GRIDS)
def test_what_a_tensor_forgets_depends_on_no_other_tensors_gradient(name, granularity):
    model, optimizer = started(name, granularity)
    list(train(model, optimizer, range(FIRST_JOINT_STEP + 5)))
    assert optimizer.redundant.any()
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    model(**batch(0)).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    after = {}
    for reversed_layer in ("none", "vit.layers.0.", "vit.layers.1."):
        model.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))
        for name, parameter in model.named_parameters():
            sign = -1 if name.startswith(reversed_layer) else 1
            parameter.grad = sign * gradients[name]  # a copy, since the step changes it
        optimizer.step()
        after[reversed_layer] = {name: p.clone() for name, p in model.named_parameters()}
    plain = after.pop("none")
    for reversed_layer, tensors in after.items():
        others = [name for name in tensors if not name.startswith(reversed_layer)]
        assert [name for name in others if not torch.equal(tensors[name], plain[name])] == []
