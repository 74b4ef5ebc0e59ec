"""WHAT goes together? The quantization-aware dependency graph (QADG) of a model."""
