"""The compression's state, behind the progress bar of a run."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from hf_geta.optim.schedule import Stage


class CompressionProgress(TrainerCallback):
    """Shows the compression's state behind the progress bar."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Refresh the bar from the logged figures."""
        if not logs or "relative_bops" not in logs:
            return
        text = (
            f"{Stage(logs['stage']).label}: {logs['group_sparsity']:.0%} of groups removed, "
            f"weights {logs['weight_bits']:.1f} bits, activations {logs['activation_bits']:.1f} bits, "
            f"BOPs {logs['relative_bops']:.1%}"
        )
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.set_postfix_str(text)
