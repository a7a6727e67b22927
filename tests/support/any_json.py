"""JSON from anybody. Python reads no number of over 4,300 digits, which is nothing to refuse here."""

from __future__ import annotations

import json
from typing import Any

MOST_DIGITS = 4300


def load_json(raw: bytes | str) -> Any:
    """Return the value; a number that Python does not read becomes another, as far beyond all bounds.

    :raises ValueError: this is not JSON.
    """
    return json.loads(raw, parse_int=_integer)


def _integer(digits: str) -> int:
    return int(digits if len(digits.lstrip("-")) <= MOST_DIGITS else digits[:MOST_DIGITS])
