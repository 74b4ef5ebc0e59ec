"""PackedEmbedding: a table that is looked up in its packed rows, and not decoded as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.manifest import LayerManifest
from hf_geta.checkpoint.packing import unpack_rows
from hf_geta.quantization.swap import embedding_class


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override]  # `weight` is read-only here
    """nn.Embedding, or a class that scales what it looks up, from a packed weight; dense shape (entries, width).

    A lookup decodes the rows that it returns. Who reads `weight` decodes the table: an output layer that shares it.
    """

    def __init__(self, dense: nn.Module, manifest: LayerManifest, shared_with: PackedLayer | None = None) -> None:
        super().__init__(dense, manifest, shared_with)
        self.kept_buffers = tuple(dense._buffers)
        for name, buffer in dense._buffers.items():  # what it scales by; transformers computes it, no file has it
            self.register_buffer(name, buffer, persistent=name not in dense._non_persistent_buffers_set)
            self._is_hf_initialized = False
        kind: Any = getattr(dense, "float_class", type(dense))
        self.float_class = kind
        self.__class__ = embedding_class(kind, PackedEmbedding)

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table in the model's dtype, (..., width), for ids (...)."""
        rows, manifest = input.reshape(-1), self.manifest
        stored, step_sizes = self._stored(), self._owner._buffers.get("step_size")
        if stored.dtype == torch.int8:  # an output layer that shares them holds them so
            integers = stored.index_select(0, rows)
        else:
            integers = unpack_rows(stored, manifest.bits, manifest.shape[1], rows)
        step_size: Any = self._owner.manifest.step_size
        if step_sizes is not None:
            step_size = step_sizes.index_select(0, rows)[:, None]
        return (step_size * integers).to(self.weight_dtype).view(*input.shape, -1)

    def _is_matrix_product(self) -> bool:
        return False
