"""A run with a loop of its own over a model that `fully_shard` has cut: `run_sharded.py FOLDER NAME ...`.

Started on several processes, it trains each model of MODELS in pieces, with the same global batch as one process does,
and leaves what the run ended with in `FOLDER/NAME.pt`, and the small model, which rank 0 alone keeps, in `FOLDER/NAME`.
The tests call `train` for what a single process ends with.
"""

import contextlib
import io
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, create_optimizer, finalize_model, prepare_model, quantizer_parameters, sharding
from hf_geta.checkpoint import gather
from hf_geta.plan.devices import plan_communication
from hf_geta.plan.memory import tensor_bytes
from hf_geta.sharding import is_cut, local_gradient, whole

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from runs import leave_processes

STEPS, GLOBAL_BATCH = 30, 8
RESUMED_STEP = 12  # inside a pruning period
BROKEN_STEPS = {1, 8, 14, 25}  # one in every stage
SHARE = GETAConfig(group_sparsity=0.5, weight_bits=[2, 6], activation_bits=[4, 8], pruning_periods=3)
PER_BLOCK = GETAConfig(**{**SHARE.to_dict(), "granularity": "block", "weight_block_size": 16, "saliency": "mix"})
BUDGET = GETAConfig(target_bops=0.01, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=3)
FLOAT = GETAConfig(group_sparsity=0.5, weight_bits=None, activation_bits=None, pruning_periods=3)
EMBEDDINGS = GETAConfig(**{**SHARE.to_dict(), "quantize_embeddings": 8})


def vit():
    # 13 and 41 are cut unevenly between two processes
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 41}
    images = {"image_size": 14, "patch_size": 7, "num_channels": 1, "num_labels": 13}
    return ViTForImageClassification(ViTConfig(**sizes, **images))


def llama():
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 37, "vocab_size": 51}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=13, **sizes))


def images(generator):
    labels = torch.randint(0, 13, (GLOBAL_BATCH,), generator=generator)
    pixels = torch.randn(GLOBAL_BATCH, 1, 14, 14, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels + labels.view(-1, 1, 1, 1) / 4, "labels": labels}


def small_images(generator):
    """Sums of what is forgotten are float32: of many inputs of convolutions one between two codes would flip."""
    batch = images(generator)
    return {**batch, "pixel_values": batch["pixel_values"][..., :6, :6]}


def texts(generator):
    ids = torch.randint(0, 51, (GLOBAL_BATCH, 1), generator=generator) + torch.arange(12)
    return {"input_ids": ids % 51, "labels": ids % 51}


# name -> (model, batches, targets, which modules are cut by themselves)
MODELS = {
    "vit": (vit, images, SHARE, "vit.layers"),
    "block": (vit, images, PER_BLOCK, "vit.layers"),
    "budget": (vit, images, BUDGET, "vit.layers"),
    "float": (vit, images, FLOAT, "vit.layers"),
    "llama": (llama, texts, EMBEDDINGS, "model.layers"),
    "resnet": (resnet, small_images, SHARE, "resnet.encoder.stages"),
}


def cut(model, modules):
    """As FSDP2 is used: block by block, then the rest; of four processes, two hold each piece (HSDP)."""
    processes = dist.get_world_size()
    if processes == 2:
        mesh = init_device_mesh("cpu", (2,))
    else:
        mesh = init_device_mesh("cpu", (2, processes // 2), mesh_dim_names=("replicate", "shard"))
    ignored = quantizer_parameters(model)
    for block in model.get_submodule(modules):
        fully_shard(block, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)
    assert all(isinstance(p, DTensor) for p in model.parameters() if p not in ignored)


def check_that_all_or_nothing_is_cut():
    model = vit()
    prepare_model(model, SHARE, {"pixel_values": torch.randn(2, 1, 14, 14)})
    fully_shard(model, ignored_params={*quantizer_parameters(model), model.vit.layers[1].mlp.fc1.weight})
    with pytest.raises(ValueError, match=r"vit\.layers\.1\.mlp\.fc1\.weight lie whole .* fully_shard\(model"):
        new_optimizer(model)


def train(name):
    """What a run ends with, and its model; in float64, so that sums in another order hardly differ."""
    make, batches, targets, modules = MODELS[name]
    processes = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(0)
    model = make().to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    parts = 1 if name == "resnet" else processes  # its batch norm sees the batch: each process has all of it

    def next_batch():
        return {key: value.chunk(parts)[rank % parts] for key, value in batches(generator).items()}

    prepare_model(model, targets, {key: value for key, value in next_batch().items() if key != "labels"})
    if processes > 1:
        cut(model, modules)
    optimizer = new_optimizer(model)
    groups, messages = [], []
    for step in range(STEPS):
        if processes > 1 and step == RESUMED_STEP:
            optimizer = resumed(optimizer, model)
        if processes > 1 and step in BROKEN_STEPS and name != "resnet":  # whose batch norm would see the batch
            check_that_nan_on_one_process_is_a_step_of_none(model, batches(torch.Generator()), optimizer)
        model(**next_batch()).loss.backward()
        with counted() as count:
            optimizer.step()
        messages.append(count)
        optimizer.zero_grad()
        groups.append(optimizer.removed.tolist())
    assert optimizer.removed.sum() == optimizer.groups_to_remove
    # what calibration adds up is the more, the more processes there are; its clips are not
    weights = {key: whole(value) for key, value in model.state_dict().items() if not key.endswith("input_power")}
    widths = optimizer.widths.bits()
    result = {"groups": groups, "weights": weights, "widths": widths, "processes": processes}
    return result | {"messages": messages, "plan": plan_communication(model, optimizer, gradients=0)}, model


def check_that_nan_on_one_process_is_a_step_of_none(model, batch, optimizer):
    """The run goes on as if it had not been, and is compared with that of a process where it was not."""
    at = optimizer.step_count
    mesh = next(parameter.device_mesh for parameter in model.parameters() if is_cut(parameter))
    is_last = mesh.get_local_rank(mesh.ndim - 1) == mesh.size(mesh.ndim - 1) - 1  # of those that hold one piece, all
    for place in ("loss", "piece"):  # from a loss it spreads to all pieces; in one piece only its holder sees it
        (model(**batch).loss * (torch.nan if is_last and place == "loss" else 1)).backward()
        if is_last and place == "piece":
            max((local_gradient(p) for p in model.parameters() if is_cut(p)), key=torch.numel).view(-1)[0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_count == at


def new_optimizer(model):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    return create_optimizer(model, base, STEPS)


def resumed(optimizer, model):
    """Another optimizer, with the state that this process saved; momentum lies in pieces."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = new_optimizer(model)
    other.load_state_dict(torch.load(file, weights_only=False))
    return other


@contextlib.contextmanager
def counted():
    """The bytes of each sum over processes that is sent meanwhile."""
    sent, send = [], sharding.dist.all_reduce
    try:
        sharding.dist.all_reduce = lambda values, **options: (
            sent.append(tensor_bytes([values])),
            send(values, **options),
        )
        yield sent
    finally:
        sharding.dist.all_reduce = send


@contextlib.contextmanager
def counted_wholes():
    """How many whole tensors that were gathered live at a time; as a parameter of the small model one is another."""
    counts, alive, whole = [], weakref.WeakSet(), gather.whole

    def remembered(tensor):
        value = whole(tensor).clone()  # gloo's thread may hold its own for a moment longer
        alive.add(value)
        counts.append(len(alive))
        return value

    try:
        gather.whole = remembered
        yield counts
    finally:
        gather.whole = whole


def finalize(model):
    """The small model, on rank 0; each process's (most whole tensors at a time, bytes of it that are here)."""
    with counted_wholes() as counts:
        small = finalize_model(model, is_main_process=dist.get_rank() == 0)
    here = tensor_bytes(tensor for tensor in (*small.parameters(), *small.buffers()) if not tensor.is_meta)
    assert len(counts) == sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (max(counts), here))
    return small, told


def main(folder, *names):
    dist.init_process_group("gloo")
    check_that_all_or_nothing_is_cut()
    for name in names:
        result, model = train(name)
        small, result["held"] = finalize(model)
        everywhere = {key: value.tolist() for key, value in finalize_model(model).state_dict().items()}
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, everywhere)
        assert all(one == told[0] for one in told), f"{name}: the processes ended with different models"
        if dist.get_rank() == 0:
            assert {key: value.tolist() for key, value in small.state_dict().items()} == everywhere
            torch.save(result, Path(folder) / f"{name}.pt")
            small.save_pretrained(Path(folder) / name)
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
