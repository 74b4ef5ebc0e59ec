"""The product of a quantized input with a quantized weight, as one step of autograd.

A layer that rounds its operands and then multiplies keeps both rounded copies for the backward pass. Here x and the
weight are kept as they are (the unquantized layer keeps them too) and rounded again: the same memory as without
quantizers, and one gradient pass per operand. That pass rounds, too; so the operand that costs more to round goes
first, and only the other one is rounded apart.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_geta.quantization import kernels
from hf_geta.quantization.kernels import Grid

CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}  # by the dimensions of space
WEIGHT_COST = 6  # what an entry of a weight, which has an exponent, takes to round, over one of an input


class Product(Protocol):
    """y = x * w + b and its gradients; `grad` and the operands are of one dtype."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor: ...

    def grad_bias(self, grad: Tensor) -> Tensor: ...


class LinearProduct:
    """x w^T + b, with weight (out, in); or x w + b, with weight (in, out), if `transposed`."""

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return grad @ (weight.t() if self.transposed else weight)

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])  # (tokens, out), (tokens, in)
        return x.t() @ grad if self.transposed else grad.t() @ x

    def grad_bias(self, grad: Tensor) -> Tensor:
        return grad.reshape(-1, grad.shape[-1]).sum(0)


class ConvProduct:
    """The convolution of x (batch, in, *space) with weight (out, in / groups, *kernel), zeros outside."""

    def __init__(
        self, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int
    ) -> None:
        self.options = (stride, padding, dilation, groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return CONVOLUTIONS[x.dim() - 2](x, weight, bias, *self.options)

    def grad_input(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, 0)

    def grad_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(grad, x, weight, 1)

    def grad_bias(self, grad: Tensor) -> Tensor:
        return grad.sum([dim for dim in range(grad.dim()) if dim != 1])

    def _backward(self, grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
        stride, padding, dilation, groups = self.options
        mask, output_padding = [which == 0, which == 1, False], [0] * len(stride)
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, output_padding, groups, mask
        )[which]


def quantized_product(
    product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, x_grid: Grid | None, weight_grid: Grid
) -> Tensor:
    """`product.forward(Q(x), Q(weight), bias)`, Q as in `fake_quantize`; `x_grid=None` leaves x as it is."""
    signed = x_grid is None or x_grid.signed
    x_scalars = (None, None) if x_grid is None else x_grid[:2]
    *weight_scalars, _, multipliers, block_of, block_size = weight_grid  # weights are signed
    tensors = (x, weight, bias, *x_scalars, *weight_scalars, multipliers, block_of)
    return _QuantizedProduct.apply(product, signed, block_size, *tensors)


class _QuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        signed: bool,
        block_size: int,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *scalars: Any,
    ) -> Tensor:
        ctx.product, ctx.signed, ctx.block_size = product, signed, block_size
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, *scalars)
        x_grid, weight_grid = _grids(scalars, signed, block_size)
        y = product.forward(_rounded(x, x_grid), _rounded(weight, weight_grid), bias)
        # nobody else has what it may be a view of, and autograd lets no model write into a view (`y += residual`)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *scalars = ctx.saved_tensors
        operands, grids = (x, weight), _grids(scalars, ctx.signed, ctx.block_size)
        gradient_of = (ctx.product.grad_input, ctx.product.grad_weight)
        needs_x, needs_weight, needs_bias, needs_x_step, needs_x_clip, *needs_weight_grid = ctx.needs_input_grad[3:]
        needed = (needs_x or needs_x_step or needs_x_clip, needs_weight or any(needs_weight_grid))
        values: list[Any] = [None, None]  # the rounded operands, of the dtype in which the product ran under autocast
        gradients: list[Any] = [(None,) * 5] * 2  # of an operand and of its grid's d, q_m, t and s
        first = int(needed[1] and (grids[0] is None or x.numel() < WEIGHT_COST * weight.numel()))
        for one, other in ((first, 1 - first), (1 - first, first)):
            if not needed[one]:
                continue
            if values[other] is None:
                values[other] = _rounded(operands[other], grids[other]).to(grad.dtype)
            itself = operands[one].to(grad.dtype)  # of which a product reads the shape
            factors = (itself, values[other]) if one == 0 else (values[other], itself)
            gradient = gradient_of[one](grad, *factors).to(operands[one].dtype)
            keep_value = one == first and needed[other]
            value, gradients[one] = _differentiated(gradient, operands[one], grids[one], keep_value)
            values[one] = value.to(grad.dtype) if keep_value else None
        (grad_x, *x_grid_grads), (grad_weight, *weight_grid_grads) = gradients
        grad_bias = ctx.product.grad_bias(grad).to(ctx.bias_dtype) if needs_bias else None
        return None, None, None, grad_x, grad_weight, grad_bias, *x_grid_grads[:2], *weight_grid_grads, None, None


def _rounded(operand: Tensor, grid: Grid | None) -> Tensor:
    return operand if grid is None else kernels.forward(operand, grid)


def _differentiated(grad: Tensor, operand: Tensor, grid: Grid | None, keep_value: bool) -> tuple[Any, Any]:
    """The rounded operand, if it is kept, and the gradients of the operand and of its grid; `grad` is overwritten."""
    if grid is None:
        return operand, (grad, None, None, None, None)
    return kernels.backward(grad, operand, grid, keep_value, overwrite_grad=True)


def _grids(scalars: Any, signed: bool, block_size: int) -> tuple[Grid | None, Grid]:
    step_size, clip_max, *weight, multipliers, block_of = scalars
    weight_grid = Grid._make([*weight, True, multipliers, block_of, block_size])
    return None if step_size is None else Grid(step_size, clip_max, signed=signed), weight_grid
