"""What the generic rules of the zoo cannot know, by model type: "start" values, fields to "keep", fields to "set"."""

from __future__ import annotations

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {}
