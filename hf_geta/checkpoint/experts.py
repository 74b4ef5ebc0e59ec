"""PackedStackedLinear: the stacked experts of a layer from packed weights, decoded all at once or one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.checkpoint.packing import unpack_rows
from hf_geta.quantization.experts import StackedLinear


class PackedStackedLinear(PackedLayer, StackedLinear):
    """StackedLinear from a packed weight; dense shape (experts, out, in) or (experts, in, out)."""

    def per_expert(self) -> Any:
        """Expert -> its decoded weight; with the backend "packed" decoded when it is asked for, and dropped."""
        return self if self.backend == "packed" else self.weight.unbind(0)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        """Rows (rows, in) through one expert: (rows, out)."""
        return self.product(self._rounded(x), weight)

    def __getitem__(self, experts: Any) -> Tensor:
        if self.backend != "packed" or not isinstance(experts, int):
            return self.weight[experts]
        row = torch.tensor([experts], device=self._stored().device)
        shape, bits = self.manifest.shape[1:], self.manifest.bits
        integers = unpack_rows(self._stored(), bits, shape[0] * shape[1], row).view(shape)
        return (self.step_sizes()[experts] * integers).to(self.weight_dtype)

    def _is_matrix_product(self) -> bool:
        return False
