"""WHAT was gained? Costs and cards."""

from hf_geta.report.card import load_report, metrics_table, render_card, save_report
from hf_geta.report.cost import Cost, OperationCost, measure_cost

__all__ = ["Cost", "OperationCost", "load_report", "measure_cost", "metrics_table", "render_card", "save_report"]
