"""How every operator relates the axes of its tensors: short rules, found by operator, open to users."""

from hf_geta.graph.rules import contractions, indexing, pointwise, reductions, views
from hf_geta.graph.rules.context import Axes, TensorAxes
from hf_geta.graph.rules.registry import RULES, find_rule, rule

__all__ = [
    "RULES",
    "Axes",
    "TensorAxes",
    "contractions",
    "find_rule",
    "indexing",
    "pointwise",
    "reductions",
    "rule",
    "views",
]
