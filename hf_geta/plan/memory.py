"""How much memory does a training step take? One is run on tensors without numbers, and the bytes alive are counted.

Forward and backward run on fake tensors, under the autocast and the checkpointing that the run asks for, and the
optimizer steps on the meta device: every operator happens, none computes. Counted is what these operators hold. What
the device itself adds is not: its context, the workspaces of its libraries, the gaps of its allocator.

Tests hold this against torch's allocator on the CPU: within a tenth for a float model's pass; for a compressed run an
upper estimate, by half at most, for there the quantizers' kernels work block by block, and on an accelerator at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from hf_geta.graph.capture import structural_copy
from hf_geta.graph.tracing import float_tensors, quiet_torch


@dataclasses.dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer: its state, and what one step of it holds beside state, weights and gradients."""

    state: int
    temporary: int


@dataclasses.dataclass(frozen=True)
class PassMemory:
    """Bytes of one forward and backward.

    Attributes:
        activations: what the forward leaves for the backward, beside the weights.
        peak: the most that is alive at once in either, gradients as they come included, beside the weights.
    """

    activations: int
    peak: int


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of the storages that operators make, and of those that are still alive.

    Args:
        before: tensors that are there already and do not count.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in before:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())


def measure_pass(
    model: Any,
    inputs: Mapping[str, Any],
    autocast: torch.dtype | None = None,
    checkpointing: Mapping[str, Any] | None = None,
    accumulates: bool = False,
) -> PassMemory:
    """The bytes of a forward and a backward of `model` on `inputs` in train mode; only shapes and dtypes are used.

    The loss is the cross entropy of every output in float32, which is what most tasks make of their logits.

    Args:
        model: a model of transformers, on any device; it is left alone.
        autocast: the dtype of mixed precision.
        checkpointing: keyword arguments of `torch.utils.checkpoint`, where each block is computed twice instead of
            kept; None keeps all.
        accumulates: gradients of an earlier batch are there already (they are not counted).

    Raises:
        RuntimeError, TypeError, ValueError ...: whatever a forward raises that decides by numbers.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")  # autocast knows no meta device

    twin: Any = structural_copy(model, fake).train()
    if checkpointing is not None:
        enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False, **checkpointing})
    mixed = contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    given = pytree.tree_map_only(Tensor, fake, dict(inputs))
    with mode, quiet_torch(), torch.random.fork_rng(devices=[]):
        for parameter in twin.parameters():
            if accumulates and parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        gradients = [p.grad for p in twin.parameters() if p.grad is not None]
        ledger = LiveBytes([*twin.parameters(), *twin.buffers(), *gradients, *_tensors_in(given)])
        with ledger:
            with mixed:
                outputs = float_tensors(twin(**given, **_without_cache(twin)))
            loss = sum(_cross_entropy(output) for output in outputs.values())
            del outputs
            activations = ledger.now
            loss.backward()  # type: ignore[union-attr]
    return PassMemory(activations, ledger.peak)


def measure_optimizer(
    make: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> OptimizerMemory:
    """The bytes of `make(parameters, **options)` and of its step, on parameters of these shapes and dtypes.

    Args:
        make: the optimizer's class. Where it can step on all parameters at once (`foreach`) and is not fused, it does:
            that is what torch does on an accelerator.
    """
    twins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters if p.requires_grad]
    for twin in twins:
        twin.grad = torch.empty_like(twin)
    options = dict(options)
    if "foreach" in inspect.signature(make).parameters:
        options["foreach"] = not options.pop("fused", False)  # fused, nothing is held beside a tensor's state
    ledger = LiveBytes([*twins, *(twin.grad for twin in twins if twin.grad is not None)])
    with ledger:
        optimizer = make(twins, **options)
        optimizer.step()
        state = ledger.now
        ledger.peak = state
        optimizer.step()
    return OptimizerMemory(state, ledger.peak - state)


def _tensors_in(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _without_cache(model: Any) -> dict[str, bool]:
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


def _cross_entropy(output: Tensor) -> Tensor:
    rows = output.float().reshape(-1, output.shape[-1])
    return nn.functional.cross_entropy(rows, rows.new_zeros(len(rows), dtype=torch.long))
