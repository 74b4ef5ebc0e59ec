"""1,024 processes, one after the other: what their pieces say of the groups adds up to what the whole model says."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, create_optimizer, prepare_model
from hf_geta.optim.choice import choose_least_salient
from hf_geta.optim.saliency import first_order, magnitude, mix, observe
from hf_geta.optim.space import PruningSpace
from hf_geta.preparation import preparation_of, prunable_parameters

PROCESSES = 1024
KINDS = ("taylor", "fisher")
# One layer has two rows for each of the first 750 processes. Other layers have a row for 16 of them; 274 hold nothing.
WITH_ROWS = 750
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 1500}
SHAPE = {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}


@pytest.fixture(scope="module")
def whole():
    """A model with gradients, and what chooses its groups."""
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SHAPE))
    config = GETAConfig(group_sparsity=0.5, pruning_periods=2)
    prepare_model(model, config, {"pixel_values": torch.randn(4, 1, 8, 8)})
    optimizer = create_optimizer(model, torch.optim.SGD(model.parameters(), lr=1e-2), 40)
    model(pixel_values=torch.randn(4, 1, 8, 8)).logits.square().sum().backward()
    return model, optimizer.targets


def space_of_pieces(model, mesh):
    """The groups of a model whose parameters are cut among the processes as torch's `fully_shard` cuts them."""
    pieces = {}
    for name, parameter in prunable_parameters(model).items():
        cut = [tensor.detach().chunk(PROCESSES) for tensor in (parameter, parameter.grad)]
        here = [parts[dist.get_rank()] if dist.get_rank() < len(parts) else parts[0][:0] for parts in cut]
        layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        value, gradient = (DTensor.from_local(part, mesh, [Shard(0)], **layout) for part in here)
        pieces[name] = nn.Parameter(value)
        pieces[name].grad = gradient
    return PruningSpace(preparation_of(model).qadg.axes, pieces)


def decision(sums, share):
    """(how groups rank, which a first decision removes), from (2, groups): <x, g>, and the summed squares."""
    scores = dict(zip(KINDS, observe(sums[0], KINDS), strict=True)) | {"magnitude": sums[1].sqrt()}
    ranking = mix(scores, dict.fromkeys(scores, 1.0), share.kind_sizes)
    none = torch.zeros(share.space.num_groups, dtype=torch.bool)
    return ranking, choose_least_salient(ranking, none, share.groups_to_remove, share.space.axis_sizes)


def test_the_pieces_of_1024_processes_choose_the_groups_that_the_whole_model_does(whole):
    """Each sends as many numbers as there are groups, whatever it holds; in whatever order they are added up."""
    model, share = whole
    messages = []
    for rank in range(PROCESSES):
        dist.init_process_group("fake", rank=rank, world_size=PROCESSES, store=FakeStore())  # sums stay its own
        try:
            space = space_of_pieces(model, init_device_mesh("cpu", (PROCESSES,)))
            messages.append(torch.stack([first_order(space), magnitude(space).square()]))
        finally:
            dist.destroy_process_group()
    expected = torch.stack([first_order(share.space), magnitude(share.space).square()])
    assert torch.stack(messages).any(1).any(1).sum() == WITH_ROWS
    ranking, chosen = decision(expected, share)
    cut = ranking[chosen].max()
    for seed in range(3):
        total = torch.zeros_like(expected)
        for rank in torch.randperm(PROCESSES, generator=torch.Generator().manual_seed(seed)).tolist():
            total += messages[rank]
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        differ = decision(total, share)[1] != chosen
        assert (ranking[differ] / cut - 1).abs().lt(1e-4).all()  # none but those between which noise decides
        assert differ.sum() <= 2
