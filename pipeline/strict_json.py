"""JSON that any reader takes."""

from __future__ import annotations

import json
import math
from typing import Any


def strict_json(value: Any) -> str:
    """``value`` as indented JSON, which knows neither NaN nor infinity: null in their place."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
