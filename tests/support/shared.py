"""What tests share, such as a guest that has booted: made once, and anew after a test that failed.

A failed test may leave its guest paused, busy or without its device. The next test gets another guest, so
that each failure in a report has a cause of its own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import pytest

FAILED = pytest.StashKey[set[str]]()
# A guest that does not come up twice will not the third time: each time takes minutes.
MOST_FAILURES = 2

T = TypeVar("T")


class LeftByFailure(Exception):
    """Thrown into what is ended because of a failed test, whose traces are no failure of their own."""


class Shared(Generic[T]):
    """Makes its thing when a test asks first. Ended by `close`."""

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._stack = contextlib.ExitStack()
        self._things: list[T] = []
        self._borrower = ""
        self._failures: list[str] = []

    def lend(self, request: pytest.FixtureRequest) -> T:
        """Return the thing to the test that asks; another one if the last test that had it failed."""
        if self._borrower in request.config.stash[FAILED]:
            self._drop()
        self._borrower = request.node.nodeid
        if not self._things:
            self._things = [self._made()]
        return self._things[0]

    def close(self) -> None:
        """End the thing and check what it leaves behind."""
        self._things.clear()
        self._stack.close()

    def _made(self) -> T:
        if len(self._failures) >= MOST_FAILURES:
            pytest.fail(f"It could not be made {MOST_FAILURES} times: {'; '.join(self._failures)}")
        try:
            return self._stack.enter_context(self._make())
        except Exception as error:
            self._failures.append(repr(error))
            raise

    def _drop(self) -> None:
        self._things.clear()
        with contextlib.suppress(LeftByFailure), self._stack:
            raise LeftByFailure


def shared(scope: str = "module", **options: Any) -> Callable[[Callable[..., Iterator[T]]], Any]:
    """Make a fixture of a generator function, as `pytest.fixture` does; it gives a `Shared` of what comes."""

    def decorate(function: Callable[..., Iterator[T]]) -> Any:
        manager = contextlib.contextmanager(function)

        def fixture(**arguments: Any) -> Iterator[Shared[T]]:
            with contextlib.closing(Shared(lambda: manager(**arguments))) as found:
                yield found

        fixture.__name__, fixture.__doc__ = function.__name__, function.__doc__
        fixture.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return pytest.fixture(scope=scope, **options)(fixture)

    return decorate
