"""What QASSO sends is what the plan says, counted message by message among processes that are not there."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, create_optimizer, prepare_model, quantizer_parameters
from hf_geta.optim.schedule import Stage
from hf_geta.plan.plan import make_plan
from hf_geta.plan.run import read_run

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
SHAPE = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}
PERIODS = 4
WIDTHS = {"weight_bits": [3, 6], "activation_bits": [4, 8], "pruning_periods": PERIODS}
TARGETS = {
    "share": {"group_sparsity": 0.5, **WIDTHS},
    "blocks": {"group_sparsity": 0.5, "granularity": "block", "saliency": "mix", **WIDTHS},
    "budget": {"target_bops": 0.02, **WIDTHS},
}


class Messages(TorchDispatchMode):
    """While active, notes every collective as (name, bytes), whoever starts it."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.sent.append((func.__name__.split("_")[0], sum(t.numel() * t.element_size() for t in tensors)))
        result = func(*args, **(kwargs or {}))
        if func.__name__.startswith("all_gather_into_tensor"):  # of a tensor in pieces
            self.sent.append(("gather", result.numel() * result.element_size()))
        return result


@pytest.fixture
def many_processes():
    """Rank 0 of 1,024; what it sends goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=1024, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "run.yaml"
    values = {"model_type": "vit", "config_overrides": SHAPE, "max_steps": 40}
    found = {}
    for name, targets in TARGETS.items():
        file.write_text(json.dumps({**values, "geta": targets}))
        found[name] = make_plan(read_run(file), processes=1024).communication
    return found


def messages_of_a_run(targets, steps):
    """The messages of preparation; of each forward; the bytes of each gradient bucket; the messages of each step."""
    torch.manual_seed(0)
    model, pixels = ViTForImageClassification(ViTConfig(**SHAPE)), torch.randn(6, 1, 8, 8)
    with Messages() as preparation:
        prepare_model(model, GETAConfig(**targets), {"pixel_values": pixels})
    wrapped, buckets = DistributedDataParallel(model), []

    def note(_, bucket):
        buckets.append(4 * bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, note)
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=1e-2), steps)
    forwards, in_steps = [], []
    for _ in range(steps):
        with Messages() as forward:
            loss = wrapped(pixel_values=pixels).logits.square().sum()
        loss.backward()
        with Messages() as step:
            optimizer.step()
        optimizer.zero_grad()
        forwards.append(forward.sent)
        in_steps += step.sent
    assert len(buckets) == steps  # of so small a model
    return preparation.sent, forwards[-1], buckets[-1], in_steps


@pytest.mark.parametrize("name", TARGETS)
def test_a_run_sends_what_its_plan_says_however_long_it_is(name, plans, many_processes):
    plan = plans[name]
    for steps in (40, 60):
        preparation, forward, bucket, in_steps = messages_of_a_run(TARGETS[name], steps)
        assert bucket == plan.gradients + plan.quantizer_gradients
        assert {kind for kind, _ in forward} == {"broadcast"}
        assert len(forward) == (3 if name == "blocks" else 1)  # one of each dtype
        assert sum(size for _, size in forward) == plan.buffers
        assert sum(size for kind, size in preparation if kind == "allreduce") == plan.calibration
        *decisions, final = in_steps
        assert {kind for kind, _ in in_steps} == {"broadcast"}
        assert len(decisions) == PERIODS * plan.decision_messages
        assert sum(size for _, size in decisions) == PERIODS * plan.decision
        assert final == ("broadcast", plan.final_widths)


@pytest.fixture
def two_processes():
    """Rank 0 of two, between which every weight is cut evenly: padding would be gathered, too."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def messages_in_pieces(targets, steps, mesh):
    """QASSO, and the messages of each of its steps; gradients are made up, since no engine runs."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SHAPE))
    prepare_model(model, GETAConfig(**targets), {"pixel_values": torch.randn(6, 1, 8, 8)})
    fully_shard(model, mesh=mesh, ignored_params=quantizer_parameters(model))
    optimizer, in_steps = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=1e-2), steps), []
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        with Messages() as step:
            optimizer.step()
        in_steps.append(step.sent)
    return optimizer, in_steps


@pytest.mark.parametrize("name", TARGETS)
def test_in_pieces_a_step_sends_what_the_plan_says_however_long_the_run_is(name, plans, two_processes):
    plan, gathered = plans[name], []
    for steps in (40, 60):
        optimizer, in_steps = messages_in_pieces(TARGETS[name], steps, two_processes)
        schedule = optimizer.schedule
        stages = [schedule.stage_at(step) for step in range(steps)]
        last = stages.index(Stage.COOLDOWN)
        for step, (stage, sent) in enumerate(zip(stages, in_steps, strict=True)):
            expected = [plan.quantizer_gradients, 8]  # and whether all gradients are finite
            expected += [plan.scores] * (stage in (Stage.PROJECTION, Stage.JOINT) or step == last)
            begins = stage is Stage.JOINT and schedule.pruning_period_at(step).is_first_step
            expected += [plan.scores] * (begins and name == "blocks")  # magnitudes, of `mix`
            sums = [size for kind, size in sent if kind == "allreduce"]
            assert sums[: len(expected)] == expected
            assert len(sums) == len(expected) + (stage is Stage.JOINT)
            assert stage is not Stage.JOINT or 0 < sums[-1] <= plan.forgotten
        gathers = [sum(size for kind, size in sent if kind == "gather") for sent in in_steps]
        moves = [size for size in gathers if size]
        falls = schedule.projection_periods(TARGETS[name]["weight_bits"][-1])
        assert moves[:falls] == [plan.moved_weights] * falls
        assert max(moves) == plan.moved_weights
        assert len(moves) == falls + (name == "blocks") or name == "budget"
        assert len(moves) <= falls + PERIODS + 1
        gathered.append(moves)
        assert {kind for sent in in_steps for kind, _ in sent} == {"allreduce", "broadcast", "gather"}
    assert gathered[0] == gathered[1]
