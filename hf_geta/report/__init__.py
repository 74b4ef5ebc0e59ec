"""WHAT was gained? Costs, reports, cards; and of a saved model: what it holds, and whether it is what it says."""

from hf_geta.report.card import render_card
from hf_geta.report.cost import Cost, OperationCost, measure_cost
from hf_geta.report.figures import metrics_table
from hf_geta.report.files import load_report, save_report

__all__ = ["Cost", "OperationCost", "load_report", "measure_cost", "metrics_table", "render_card", "save_report"]
