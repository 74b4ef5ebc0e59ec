"""A model and example inputs -> its search space: capture, walk, decide, and try what was found."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from hf_geta.checkpoint.layers import PackedLayer
from hf_geta.graph.axes import AxisNode, find, is_frozen, leaves, reasons
from hf_geta.graph.bypassed import bypassed_modules
from hf_geta.graph.capture import TRACING_ERRORS, Capture, capture, structural_copy
from hf_geta.graph.folding import fold_names
from hf_geta.graph.integers import substitute
from hf_geta.graph.qadg import QADG, Axis, Frozen, Member, Operation
from hf_geta.graph.rules.context import Contraction
from hf_geta.graph.search_space import SearchSpace
from hf_geta.graph.table import explain_missing_rules
from hf_geta.graph.tracing import named_tensors
from hf_geta.graph.trial import Law, ShapeLaw, describe_error, failing, other_inputs, run
from hf_geta.graph.walk import Walk
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)

CHEAP_MACS, CHEAP_NUMBERS = 1e9, 5e7  # a forward, and the weights, of a model that is tried on its own weights


def build_qadg(
    model: nn.Module, inputs: Mapping[str, Any], verify: bool | None = None, optional: Collection[str] = ()
) -> QADG:
    """The search space of `model`, found by tracing one forward (no architecture is known by name), and tried.

    Args:
        model: any module, with weights or on the meta device; it is left untouched.
        inputs: example inputs by argument name, as `model(**inputs)` takes them. Only their shapes matter, unless the
            forward decides by numbers in tensors.
        verify: run the law, "pruned computes what masked does", on the model's weights (three forwards): True or False,
            or where that is cheap (None), with shapes alone otherwise. What fails is frozen. With `optional` axes, and
            where the forward decides by numbers in tensors, always on the weights, in float32.
        optional: kinds of axes that are left alone unless they are asked for: "query_head", the queries within each
            key-value group instead of the groups; "head_dim", the size of a layer's heads instead of the heads.

    Raises:
        ValueError: if the forward does not take these inputs, naming what it takes, for an unknown kind, or if the
            weights are packed already.
        RuntimeError: torch's own, if there is no memory for the model's forward of these inputs.
    """
    if any(isinstance(module, PackedLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is compressed already, its weights are integers: take the float model."
        )
    optional = (optional,) if isinstance(optional, str) else optional
    captured = capture(model, inputs)
    walk = Walk(captured).run()
    space = SearchSpace(walk, model, optional)
    qadg = _assembled(captured, walk, space, model, bypassed_modules(model, inputs))
    if verify is not False:
        batches = [inputs, *other_inputs(inputs)] if captured.is_concrete else [inputs]
        on_weights = captured.is_concrete or bool(optional) or (_is_cheap(model, qadg) if verify is None else verify)
        for batch in batches:
            qadg = _tried(model, batch, qadg, on_weights, inputs)
    logger.info("%s: %s", type(model).__name__, qadg)
    if missing := explain_missing_rules(qadg):
        logger.warning("%s", missing)
    return qadg


def _assembled(captured: Capture, walk: Walk, space: SearchSpace, model: nn.Module, bypassed: tuple[str, ...]) -> QADG:
    """What was found, in the names of the model's tensors and of its axes."""
    names = {leaf: name for leaf, (name, _) in space.free.items()}
    axes = [
        Axis(name, kind, leaf.size, tuple(Member(slot.tensor, slot.dim, slot.indices) for slot in space.slots[leaf]))
        for leaf, (name, kind) in space.free.items()
    ]

    def named(leaf: Any) -> Any:
        return names.get(leaf, leaf)

    equations = [
        equation._replace(left=substitute(equation.left, named), right=substitute(equation.right, named))
        for equation in space.equations
    ]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    operations = [
        operation if operation.weight in parameters else replace(operation, weight=None)  # a product with a buffer
        for one in walk.axes.contractions
        for operation in _operations(one, names)
    ]
    return QADG(
        tuple(axes),
        _frozen(space),
        tuple(operations),
        tuple(equations),
        captured.attributes,
        bypassed=bypassed,
    )


def _tried(model: nn.Module, inputs: Mapping[str, Any], qadg: QADG, on_weights: bool, given: Mapping[str, Any]) -> QADG:
    """The search space without the axes that break the law on these inputs, which were made of the `given` ones."""
    names = [axis.name for axis in qadg.axes]
    for law_of in (Law, ShapeLaw) if on_weights else (ShapeLaw,):
        try:
            failures = failing(names, law_of(model, inputs, qadg))
            if failures and law_of is Law:
                failures = _failing_in_double(names, model, inputs, qadg, failures)
        except TRACING_ERRORS as error:
            problem, no_memory = describe_error(error), should_reduce_batch_size(error)
        else:
            for why in dict.fromkeys(failures.values()):
                names = fold_names(name for name, reason in failures.items() if reason == why)
                logger.warning("%s: frozen, since pruning it fails: %s", ", ".join(names), why)
            return qadg.without({name: f"tried and found wrong: {why}" for name, why in failures.items()})
        if no_memory:  # with our copies gone by now: raises, if there is none for the batch
            run(structural_copy(model), given)
        level, how = (logging.WARNING, "its weights") if law_of is Law else (logging.DEBUG, "shapes")
        logger.log(level, "%s could not be tried on %s: %s", type(model).__name__, how, problem)
    return qadg


def _failing_in_double(
    names: list[str], model: nn.Module, inputs: Mapping[str, Any], qadg: QADG, failures: dict[str, str]
) -> dict[str, str]:
    """What still fails where rounding cannot be why; a model that insists on its own precision is judged in that."""
    try:
        return failing(names, Law(model, inputs, qadg, dtype=torch.float64))
    except TRACING_ERRORS:
        return failures


def _is_cheap(model: nn.Module, qadg: QADG) -> bool:
    tensors = named_tensors(model)
    is_real = not any(tensor.is_meta for tensor in tensors.values())
    is_float = not any(isinstance(module, Quantizer) for module in model.modules())  # grids tip over by rounding
    numbers = sum(tensor.numel() for tensor in tensors.values())
    macs = sum(operation.macs for operation in qadg.operations)
    return is_real and is_float and numbers <= CHEAP_NUMBERS and macs <= CHEAP_MACS


def _operations(contraction: Contraction, names: Mapping[AxisNode, str]) -> Iterator[Operation]:
    """The terms of the product of all loop sizes, each of which may be a sum (a concatenation)."""
    counts: Counter[tuple[str, ...]] = Counter()
    for terms in itertools.product(*(_size_terms(axis, names) for axis in contraction.loops)):
        macs = math.prod(count for count, _ in terms)
        counts[tuple(sorted(itertools.chain.from_iterable(factors for _, factors in terms)))] += macs
    for factors, macs in counts.items():
        yield Operation(contraction.name, contraction.weight, macs, factors)


def _size_terms(axis: AxisNode, names: Mapping[AxisNode, str]) -> list[tuple[int, tuple[str, ...]]]:
    """The size of an axis as a sum of (count, prunable axes that it is proportional to)."""
    axis = find(axis)
    if is_frozen(axis) or not axis.parts:
        return [(axis.size, (names[axis],) if axis in names else ())]
    terms = [_size_terms(part, names) for part in axis.parts]
    if not axis.is_product:
        return list(itertools.chain.from_iterable(terms))
    return [
        (math.prod(count for count, _ in one), tuple(itertools.chain.from_iterable(factors for _, factors in one)))
        for one in itertools.product(*terms)
    ]


def _frozen(space: SearchSpace) -> tuple[Frozen, ...]:
    """The dimensions whose leaves are all frozen, by reason."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for (tensor, dim), axis in space.dims.items():
        if axis.size > 1 and not any(leaf in space.free for leaf in leaves(axis)):
            reason = reasons(axis)[0]
            grouped.setdefault((reason.text, reason.operator, reason.module), []).append(f"{tensor}[{dim}]")
    return tuple(Frozen(*why, tuple(dimensions)) for why, dimensions in grouped.items())
