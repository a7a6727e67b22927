"""Rates against their limits, on a host that may stand still in the middle of a measurement.

While it does, time goes by, in which nothing is moved, and buckets fill, which are emptied at once behind it:
what is measured then is too little or too much. No rate but the limit is measured again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

_ATTEMPTS: Final = 5


def assert_rate(measure: Callable[[], float], limit: float, *, tolerance: float) -> None:
    """Fail unless `measure`, which begins anew each time, finds `limit` in one of a few attempts."""
    found: list[float] = []
    while len(found) < _ATTEMPTS:
        found.append(measure())
        if found[-1] == pytest.approx(limit, rel=tolerance):
            return
    raise AssertionError(f"None is near {limit:g}: {', '.join(f'{rate:g}' for rate in found)}")
