"""What a run may be driven by: engines and options that QASSO does not go with are refused before anything is spent."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from accelerate.utils import DynamoBackend
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.utils import is_accelerate_available

from hf_geta.agreement import is_distributed

NOT_OF_DATA = ("tp", "cp", "sp")  # tensor, context, sequence: accelerate's ways to use several devices for one sample


def refuse_unsupported(trainer: Any) -> None:
    """Nothing, for a GETATrainer that was just made and can be driven.

    Raises:
        ValueError: what it is asked for and does not do, and what works instead.
    """
    if trainer.lr_scheduler is not None:
        raise ValueError(
            "a learning-rate scheduler made before QASSO does not know the quantizers: pass "
            "optimizers=(optimizer, None) and choose the schedule by TrainingArguments.lr_scheduler_type."
        )
    spread = len(set((getattr(trainer.model, "hf_device_map", None) or {}).values())) > 1
    by_others = trainer.is_deepspeed_enabled or trainer.is_fsdp_xla_enabled or getattr(trainer.model, "_tp_size", None)
    when_loaded = getattr(trainer, "is_distributed_loading_by_transformers", False)
    sizes = getattr(trainer.accelerator, "parallelism_config", None)
    if by_others or when_loaded or spread or any(getattr(sizes, f"{kind}_size", 1) > 1 for kind in NOT_OF_DATA):
        raise ValueError(
            "GETATrainer compresses on one device, under DDP (configs/accelerate/ddp.yaml), or in pieces under "
            "accelerate's FSDP2 (configs/accelerate/fsdp2.yaml; a ParallelismConfig with dp_shard_size and "
            "dp_replicate_size alone): DeepSpeed, XLA, tensor, context or sequence parallelism, a model that was "
            "cut when it was loaded and a device_map over several devices are not supported."
        )
    if trainer.in_pieces:
        _refuse_in_pieces(trainer)
    if trainer.args.auto_find_batch_size and (trainer.in_pieces or trainer.args.world_size > 1):
        raise ValueError(
            "auto_find_batch_size lets the process whose memory is full begin anew, while the others wait for it in "
            "the old run; and a model in pieces does not begin anew: write a batch size that fits."
        )
    if is_distributed() and dist.get_world_size() != trainer.args.world_size:
        raise ValueError(
            f"{dist.get_world_size()} processes were launched, TrainingArguments know of {trainer.args.world_size}: "
            "each would train and save by itself. Without a GPU, write use_cpu=True."
        )


def _refuse_in_pieces(trainer: Any) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
    refused = {
        "an old accelerate": (not is_accelerate_available("1.15.0"), "pip install 'accelerate>=1.15'"),
        "weights on the meta device": (
            any(parameter.is_meta for parameter in trainer.model.parameters()),
            "transformers made a head on the first process alone, write fsdp_cpu_ram_efficient_loading: false",
        ),
        "FSDP1": (plugin.fsdp_version != 2, "write fsdp_version: 2, as configs/accelerate/fsdp2.yaml does"),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "QASSO keeps its own on the device: write false, and spread the model over more devices",
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing,
            "it renames the parameters: write false, and gradient_checkpointing=True in TrainingArguments",
        ),
        "fsdp_ignored_modules": (
            plugin.ignored_modules is not None,
            "QASSO has all parameters in pieces but those of the quantizers, which are found without it",
        ),
        "torch_compile": (
            trainer.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO,
            "leave it out under FSDP2",
        ),
        "fp16": (trainer.args.fp16, "its gradient scaler takes no whole tensors beside pieces: write bf16=True"),
    }
    for name, (is_asked_for, reason) in refused.items():
        if is_asked_for:
            raise ValueError(f"GETATrainer does not train under FSDP with {name}: {reason}.")
