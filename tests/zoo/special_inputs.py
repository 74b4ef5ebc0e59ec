"""Inputs that the generic rules cannot find, by model class or model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {}
