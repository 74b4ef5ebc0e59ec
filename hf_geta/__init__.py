"""hf_geta: one training run that prunes structure and lowers bit widths together, for Hugging Face models.

Importing it registers `quant_method: "geta"` with transformers, so that compressed checkpoints load with
`from_pretrained`. The training side is imported when it is first asked for: loading needs none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from hf_geta.checkpoint.layers import set_backend_
from hf_geta.config import GETAConfig

importlib.import_module("hf_geta.hf_quantizer")  # registers quant_method "geta"; nothing here uses its names

if TYPE_CHECKING:
    from hf_geta.compress import create_optimizer, prepare_model
    from hf_geta.finalize import finalize_model
    from hf_geta.graph.build import build_qadg
    from hf_geta.graph.qadg import QADG
    from hf_geta.graph.verify import Verification, verify_qadg
    from hf_geta.hf_quantizer import GETAQuantizationConfig
    from hf_geta.optim.qasso import QASSO
    from hf_geta.preparation import quantizer_parameters
    from hf_geta.trainer import GETATrainer

_LAZY = {
    "GETAQuantizationConfig": "hf_geta.hf_quantizer",
    "GETATrainer": "hf_geta.trainer",
    "QADG": "hf_geta.graph.qadg",
    "QASSO": "hf_geta.optim.qasso",
    "build_qadg": "hf_geta.graph.build",
    "create_optimizer": "hf_geta.compress",
    "finalize_model": "hf_geta.finalize",
    "prepare_model": "hf_geta.compress",
    "quantizer_parameters": "hf_geta.preparation",
    "verify_qadg": "hf_geta.graph.verify",
    "Verification": "hf_geta.graph.verify",
}

__all__ = [
    "QADG",
    "QASSO",
    "GETAConfig",
    "GETAQuantizationConfig",
    "GETATrainer",
    "Verification",
    "build_qadg",
    "create_optimizer",
    "finalize_model",
    "prepare_model",
    "quantizer_parameters",
    "set_backend_",
    "verify_qadg",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
