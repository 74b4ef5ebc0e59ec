"""ShardedTrainer: transformers' Trainer, whose compressing runs lie in pieces where accelerate's FSDP2 is asked for.

GETATrainer is one. Trainer makes the optimizer of a whole model, and accelerate then cuts the model and exchanges the
optimizer's parameters. Here the model is prepared whole and cut by accelerate before its optimizer is made, so that
QASSO sees the parameters that it will train; and checkpoints are safetensors files, one or two for each process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_geta.checkpoint.optimizer_state import joined_state, split_state
from hf_geta.checkpoint.pieces import MODEL, OPTIMIZER, Pieces, piece_files, write_pieces
from hf_geta.config import GETAConfig
from hf_geta.optim.qasso import QASSO
from hf_geta.quantization.quantizers import Quantizer
from hf_geta.sharding import is_cut, reshard_


class ShardedTrainer(Trainer):
    """Trainer with FSDP2 for a prepared model.

    Attributes:
        geta_config: the targets; without them it is Trainer.
    """

    model: PreTrainedModel
    geta_config: GETAConfig | None
    _parameters: list[list[nn.Parameter]]  # of each of the optimizer's groups

    @property
    def in_pieces(self) -> bool:
        """Whether the model lies in pieces while it trains, from the making of the optimizer on."""
        return self.geta_config is not None and self.is_fsdp_enabled

    @property
    def qasso(self) -> QASSO | None:
        """The run's QASSO, under whatever accelerate has wrapped around it."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, QASSO) else None

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """As in Trainer.

        Raises:
            ValueError: before any step: the checkpoint is of a whole model and this run is in pieces, or the other way.
        """
        if self.geta_config is not None and resume_from_checkpoint:
            _check_kind(Path(resume_from_checkpoint), self.in_pieces)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # -- cutting --------------------------------------------------------------------------------------------------

    def cut_(self) -> None:
        """Cut the prepared model as accelerate would later, with its settings; quantizers stay whole everywhere."""
        if not self.in_pieces or isinstance(self.model, FSDPModule):
            return
        quantizers = [module for module in self.model.modules() if isinstance(module, Quantizer)]
        for quantizer in quantizers:
            quantizer.to(self.accelerator.device)  # the others' parameters follow when they are cut
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # not in every accelerate that we run with

        plugin = self.accelerator.state.fsdp_plugin
        loads_on_one = plugin.cpu_ram_efficient_loading
        # preparation has sent rank 0's weights to all: accelerate need not
        plugin.ignored_modules, plugin.cpu_ram_efficient_loading = quantizers, False
        try:
            fsdp2_prepare_model(self.accelerator, self.model)
        finally:
            plugin.ignored_modules, plugin.cpu_ram_efficient_loading = None, loads_on_one

    def remember_parameters(self) -> None:
        """Keep the optimizer's lists: accelerate finds parameters again by their addresses, and empty pieces share one.

        `create_scheduler` puts them back.
        """
        assert self.optimizer is not None
        self._parameters = [list(group["params"]) for group in self.optimizer.param_groups]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As in Trainer, which calls it when accelerate is done with the optimizer."""
        if self.in_pieces and self.qasso is not None:
            for group, parameters in zip(self.qasso.param_groups, self._parameters, strict=True):
                group["params"] = list(parameters)
        return super().create_scheduler(num_training_steps, optimizer)

    # -- while it trains ------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in Trainer; what no engine reduces is averaged before gradients are clipped, not only in QASSO's step."""
        loss = super().training_step(*args, **kwargs)
        if self.in_pieces and self.qasso is not None and self.accelerator.sync_gradients:
            self.qasso.average_whole_gradients_()
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer.

        Raises:
            ValueError: under FSDP2, before `train()` has prepared the model and cut it.
        """
        if not self.in_pieces:
            return super().evaluation_loop(*args, **kwargs)
        if not isinstance(self.model, FSDPModule):
            raise ValueError(
                "evaluate() and predict() before train() would cut a model that is not prepared yet: write "
                "eval_on_start=True, or evaluate the dense model in a program of its own."
            )
        output = super().evaluation_loop(*args, **kwargs)
        reshard_(self.model)
        return output

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; of a model in pieces each process writes its own, which `_load_from_checkpoint` reads."""
        if not self.in_pieces or not isinstance(self.model, FSDPModule):
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            self._save(str(folder), state_dict={})  # config, processor, arguments
            (folder / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        write_pieces(folder, MODEL, _tensors(self.model), self.args.process_index, self.args.world_size)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.in_pieces:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        tensors, rest = split_state(self.optimizer.state_dict(), self._trained())  # type: ignore[union-attr]
        write_pieces(folder, OPTIMIZER, tensors, self.args.process_index, self.args.world_size)
        if self.args.should_save:
            torch.save(rest, folder / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)  # type: ignore[union-attr]

    def _trained(self) -> dict[str, Tensor]:
        """The optimizer's parameters in the order of its groups, by name."""
        assert self.optimizer is not None
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[p]: p for group in self.optimizer.param_groups for p in group["params"]}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.in_pieces:
            self._load_pieces(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self.in_pieces:
            self._load_pieces(Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    @torch.no_grad()
    def _load_pieces(self, folder: Path) -> None:
        pieces, whole = Pieces(folder, MODEL), {}
        for name, tensor in _tensors(self.model).items():
            if is_cut(tensor):
                pieces.fill_(tensor, name)
            else:
                whole[name] = pieces.whole(name)
        self.model.load_state_dict(whole, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.in_pieces or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.is_fsdp_enabled = False  # the files of the rest are those of any other run
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.is_fsdp_enabled = True
        assert self.optimizer is not None
        pieces = Pieces(Path(checkpoint), OPTIMIZER)
        self.optimizer.load_state_dict(joined_state(self.optimizer.state_dict(), pieces, self._trained()))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the state dict holds, tied parameters once."""
    state = model.state_dict()
    first = {parameter: name for name, parameter in model.named_parameters()}
    tied = {name for name, p in model.named_parameters(remove_duplicate=False) if first[p] != name}
    return {name: tensor for name, tensor in state.items() if name not in tied}


def _check_kind(folder: Path, in_pieces: bool) -> None:
    is_in_pieces = bool(piece_files(folder, MODEL))
    if is_in_pieces and not in_pieces:
        raise ValueError(
            f"{folder} is of a run in pieces: resume it under FSDP2 (configs/accelerate/fsdp2.yaml), on any "
            "number of processes."
        )
    if in_pieces and not is_in_pieces:
        raise ValueError(
            f"{folder} is of a run with the model whole: resume it in one process or under DDP "
            "(configs/accelerate/ddp.yaml)."
        )
