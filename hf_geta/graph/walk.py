"""Run the rules over a captured graph: every tensor gets its axes, every int argument its equation."""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn

from hf_geta.graph.capture import Capture
from hf_geta.graph.integers import Expression, SizeOf, substitute
from hf_geta.graph.rules import Axes, TensorAxes, find_rule
from hf_geta.graph.rules.registry import KEEPS_ZEROS
from hf_geta.graph.tracing import CONSTANT, INPUT, OUTPUT

logger = logging.getLogger(__name__)


class Walk:
    """The axes of everything in a captured graph.

    Attributes:
        tensors: parameter or buffer name -> its axes; only those that the forward uses.
        axes: what the rules said: equations over axes and attributes, contractions, batched axes.
    """

    def __init__(self, captured: Capture) -> None:
        self.captured = captured
        self.tensors: dict[str, TensorAxes] = {}
        self.axes = Axes()
        self._values: dict[fx.Node, Any] = {}
        self._nodes: dict[str, fx.Node] = {}

    def run(self) -> Walk:
        """Visit all nodes in order, then translate what was said about sizes of tensors into axes."""
        self._run_graph(self.captured.graph_module, None)
        said = (*self.axes.equations, *self.captured.equalities)
        self.axes.equations = [
            equation._replace(left=self._resolve(equation.left), right=self._resolve(equation.right))
            for equation in said
        ]
        return self

    def _resolve(self, expression: Expression) -> Expression:
        def axis_of(leaf: Any) -> Expression:
            if not isinstance(leaf, SizeOf):
                return leaf
            axes = self._values.get(self._nodes[leaf.node])
            if isinstance(axes, TensorAxes):
                return axes[leaf.dim]
            return self._nodes[leaf.node].meta["val"].shape[leaf.dim]

        return substitute(expression, axis_of)

    def _run_graph(self, module: fx.GraphModule, inputs: Sequence[Any] | None) -> Any:
        """Walk one graph; `inputs` are the values of a sub-graph's placeholders, None for the forward itself."""
        given = iter(inputs or ())
        for node in module.graph.nodes:
            self._nodes.setdefault(node.name, node)
            self._enter(node)
            if node.op == "placeholder":
                self._values[node] = self._source(node) if inputs is None else next(given)
            elif node.op == "get_attr":
                target = operator.attrgetter(node.target)(module)
                is_graph = isinstance(target, fx.GraphModule)
                self._values[node] = target if is_graph else self._stand_in(node, CONSTANT)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                results = fx.map_arg(node.args, lambda result: self._values[result])[0]
                if inputs is None:
                    for tensor in _flat_tensors(results):
                        self.axes.freeze(tensor, OUTPUT)
                return results
        return None

    def _enter(self, node: fx.Node) -> None:
        self.axes.node = node
        self.axes.operator = str(node.target).removesuffix(".default") if node.op == "call_function" else ""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        self.axes.module = stack[-1][0] if stack else ""

    def _source(self, node: fx.Node) -> Any:
        source = self.captured.sources.get(node.name, CONSTANT)
        if source in (INPUT, CONSTANT):
            axes = self._stand_in(node, source)
            if node.name in self.captured.constants:
                axes.constant = self.captured.constants[node.name]
            return axes
        if not node.users:
            return None  # a tied name, or a tensor that this forward does not use
        if source not in self.tensors:
            self.tensors[source] = self.axes.fresh(self.captured.tensors[source].shape)
            if isinstance(self.captured.tensors[source], nn.Parameter):  # a mask leaves buffers as they are
                self.tensors[source].parameter = source
        return self.tensors[source]

    def _call(self, node: fx.Node) -> Any:
        arguments: Any = fx.map_arg((node.args, node.kwargs), lambda argument: self._values[argument])
        if node.target is operator.getitem:
            sequence, number = arguments[0]
            return sequence[number] if isinstance(sequence, list | tuple) else sequence
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._call_graph(node, arguments[0])
        schema = getattr(node.target, "_schema", None)
        if schema is not None and not schema.returns and not schema.is_mutable:
            return None  # an assertion
        try:
            found = find_rule(node.target)
            if found is None or not isinstance(node.target, torch._ops.OpOverload):
                return self._give_up(node, arguments, f"no rule for {node.target}")
            self.axes.shape = _shape(node.meta["val"])
            key, apply = found
            result = apply(self.axes, *self._by_schema(node, *arguments))
            if _shape(result) != self.axes.shape:
                raise ValueError(f"axes of sizes {_shape(result)} for a result of shape {self.axes.shape}")
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
            logger.debug("the rule for %s failed on %s", node.target, node.format_node(), exc_info=error)
            return self._give_up(node, arguments, f"the rule for {node.target} does not fit: {error}")
        if key in KEEPS_ZEROS:
            _pass_parameter(arguments, result)
        if node.target._schema.is_mutable and isinstance(arguments[0][0], TensorAxes):
            self._forget_parameter(node.all_input_nodes[0])
        return result

    def _forget_parameter(self, changed: fx.Node) -> None:
        """A tensor that was changed in place is no longer known to be a pure weight, nor is what shares its memory."""
        while (viewed := _viewed(changed)) is not None:
            changed = viewed
        sharing = [changed]
        for node in sharing:
            value = self._values[node]
            self._values[node] = TensorAxes.of(value) if isinstance(value, TensorAxes) else value
            sharing += [user for user in node.users if user in self._values and _viewed(user) is node]

    def _by_schema(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments in the order of the operator's schema, with defaults, ints traced where they were noted."""
        integers = iter(self.captured.integers.get(node.name, ()))

        def traced(value: Any) -> Any:
            if isinstance(value, int) and not isinstance(value, bool):
                return next(integers, value)
            if isinstance(value, TensorAxes) or not isinstance(value, list | tuple):
                return value
            return [traced(part) for part in value]

        args = [traced(value) for value in args]
        kwargs = {name: traced(value) for name, value in kwargs.items()}
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        rest = [kwargs.get(argument.name, argument.default_value) for argument in schema]
        return [*args, *rest[len(args) :]]

    def _call_graph(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """Higher-order operators that only change a mode (autocast, grad) are their sub-graph."""
        for number, argument in enumerate(args):
            if isinstance(argument, fx.GraphModule) and "wrap_with" in str(node.target):
                return self._run_graph(argument, args[number + 1 :])
        return self._give_up(node, args, f"no rule for {node.target}")

    def _give_up(self, node: fx.Node, arguments: Any, text: str) -> Any:
        for tensor in _flat_tensors(arguments):
            self.axes.freeze(tensor, text)
        return self._stand_in(node, text)

    def _stand_in(self, node: fx.Node, text: str) -> Any:
        """Frozen axes for all that a node computes; None for what is no tensor."""
        shape = _shape(node.meta.get("val"))
        if isinstance(shape, list):
            return [None if one is None else self.axes.frozen(one, text) for one in shape]
        return None if shape is None else self.axes.frozen(shape, text)


def _viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory the result of `node` may lie in."""
    if node.target is operator.getitem:
        return node.all_input_nodes[0]
    schema = getattr(node.target, "_schema", None)
    return node.all_input_nodes[0] if schema and schema.arguments and schema.arguments[0].alias_info else None


def _shape(value: Any) -> Any:
    """The shape of a tensor or of its axes, a list of shapes for several, None for anything else."""
    if isinstance(value, torch.Tensor | TensorAxes):
        return tuple(map(_size, value.sizes if isinstance(value, TensorAxes) else value.shape))
    return [_shape(part) for part in value] if isinstance(value, list | tuple) else None


def _size(size: Any) -> int:
    """A size as an int; one that is only known at run time as if each of its unknowns were some large prime."""
    if isinstance(size, int):
        return int(size)
    expression = size.node.expr
    return int(expression.xreplace({symbol: _stand_in_for(symbol.name) for symbol in expression.free_symbols}))


@functools.cache
def _stand_in_for(unknown: str) -> Any:
    return sympy.Integer(sympy.prime(500 + int(re.sub(r"\D", "", unknown) or 0)))


def _flat_tensors(value: Any) -> list[TensorAxes]:
    if isinstance(value, TensorAxes):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _flat_tensors(part)] if isinstance(value, list | tuple) else []


def _pass_parameter(arguments: Any, result: Any) -> None:
    """Entries that are only moved stay zero: a result of weights alone is a weight."""
    parameters = [tensor.parameter for tensor in _flat_tensors(arguments) if tensor]
    parameter = parameters[0] if parameters and all(parameters) else None
    for tensor in _flat_tensors([result]):
        tensor.parameter = parameter
