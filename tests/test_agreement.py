"""Rank 0 decides for all: ranks whose sums differ in their last bits would otherwise prune different groups."""

import copy
import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer, create_optimizer, prepare_model
from hf_geta.agreement import _sendable
from hf_geta.optim.pricing import Pricing

STEPS, NODES, RANKS = 30, 128, (0, 8, 512, 1023)  # of 1,024 ranks on 128 nodes
WIDTHS = {"weight_bits": [3, 6], "activation_bits": [4, 8], "pruning_periods": 3, "projection_steps": 5}
TARGETS = {
    "share": GETAConfig(group_sparsity=0.5, **WIDTHS),
    "budget": GETAConfig(target_bops=0.02, **WIDTHS),
}


class Exchange:
    """`dist.broadcast` for ranks that run one after the other, rank 0 first."""

    def __init__(self):
        self.rank, self.messages, self.position = 0, [], 0

    def start(self, rank):
        self.rank, self.position = rank, 0

    def broadcast(self, message, src):
        assert src == 0
        if self.rank == 0:
            self.messages.append(message.clone())
        message.copy_(self.messages[self.position])
        self.position += 1


def prepared(config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))
    return prepare_model(model, config, {"pixel_values": torch.randn(4, 1, 8, 8)})


def reduced_gradient(size, step, order):
    """The gradient of one step, (size,), from the sums of all nodes, accumulated in bfloat16 in this order."""
    draw = torch.Generator().manual_seed(step)
    shared = torch.randn(size, generator=draw)  # what the nodes' batches have in common
    nodes = (shared + torch.randn(len(order), size, generator=draw)).bfloat16()
    total = torch.zeros_like(nodes[0])
    for node in order.tolist():
        total += nodes[node]
    return total.float() / len(order)


def decisions(model, rank):
    """(the groups that are removed at the end, the final widths) of a run on `rank`."""
    model = copy.deepcopy(model)
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=1e-2), STEPS)
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(rank))
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    for step in range(STEPS):
        gradient = reduced_gradient(sum(sizes), step, order)
        for parameter, part in zip(parameters, gradient.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        optimizer.step()
    return optimizer.removed.tolist(), optimizer.final_bits.tolist()


@pytest.mark.parametrize("name", TARGETS)
def test_ranks_that_sum_in_another_order_decide_as_rank_0_does(name, monkeypatch):
    model, exchange = prepared(TARGETS[name]), Exchange()
    alone = [decisions(model, rank) for rank in RANKS]
    assert any(one != alone[0] for one in alone[1:])  # or there is nothing to agree about
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", exchange.broadcast)
    together = []
    for rank in RANKS:
        exchange.start(rank)
        together.append(decisions(model, rank))
    assert together == [alone[0]] * len(RANKS)
    assert exchange.position == len(exchange.messages) > 0


def widths_after_each_step(model, rank):
    """(steps, quantizers) widths of a run on a rank that sees other noise and learns other step sizes than the rest."""
    model = copy.deepcopy(model)
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.0), STEPS)
    draw, widths = torch.Generator().manual_seed(rank), []
    for step in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        if isinstance(optimizer.targets, Pricing):
            optimizer.targets.sensitivity = torch.rand(len(optimizer.weights), generator=draw)
        if step == optimizer.schedule.first_cooldown_step:
            lower, upper = optimizer.width_bounds()
            learned = lower.lerp(upper, torch.rand(len(lower), generator=draw))
            optimizer.widths.project_(learned, learned)
        optimizer.step()
        widths.append(optimizer.widths.bits())
    return torch.stack(widths)


@pytest.mark.parametrize("name", TARGETS)
def test_ranks_that_learned_other_widths_train_with_those_of_rank_0(name, monkeypatch):
    model, exchange = prepared(dataclasses.replace(TARGETS[name], group_sparsity=0)), Exchange()
    alone = [widths_after_each_step(model, rank) for rank in range(2)]
    assert not torch.equal(alone[0][-1], alone[1][-1])  # or there is nothing to agree about
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "broadcast", exchange.broadcast)
    for rank in range(2):
        exchange.start(rank)
        assert torch.equal(widths_after_each_step(model, rank), alone[0])


def test_processes_that_trainer_does_not_know_of_are_refused(tmp_path):
    """Each would train by itself, and all would save into one folder."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none")
        with pytest.raises(ValueError, match="2 processes were launched, TrainingArguments know of 1"):
            GETATrainer(model=prepared(TARGETS["share"]), args=arguments, geta_config=TARGETS["share"])
    finally:
        dist.destroy_process_group()


def test_what_the_processes_cannot_send_from_its_device_is_copied_to_one_that_they_can(monkeypatch):
    """As a CPU's tensors under NCCL alone; "meta" stands for a device that is not there."""
    tensor = torch.ones(2)
    for backends, device in {"cpu:gloo,meta:nccl": "cpu", "meta:nccl": "meta"}.items():
        monkeypatch.setattr(dist, "get_backend_config", lambda backends=backends: backends)
        assert _sendable(tensor).device.type == device
    assert tensor.device.type == "cpu"
