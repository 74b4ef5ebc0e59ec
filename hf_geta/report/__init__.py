"""WHAT was gained? Costs and cards."""
