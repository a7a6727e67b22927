"""Is what tests share made once, anew after a failure, and not for ever where it cannot be made?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from support.shared import FAILED, MOST_FAILURES, LeftByFailure, Shared


@pytest.fixture
def failed() -> set[str]:
    """The names of the tests that have failed."""
    return set()


def asking(test: str, failed: set[str]) -> Any:
    """Stand for the request of a test."""
    stash = pytest.Stash()
    stash[FAILED] = failed
    return SimpleNamespace(node=SimpleNamespace(nodeid=test), config=SimpleNamespace(stash=stash))


class Maker:
    """Makes numbers, and notes how each ended."""

    def __init__(self) -> None:
        self.made = 0
        self.ended: list[str] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[int]:
        self.made += 1
        try:
            yield self.made
        except BaseException as error:
            self.ended.append(type(error).__name__)
            raise
        self.ended.append("well")


def test_tests_that_pass_have_the_same_one_which_ends_with_the_last(failed: set[str]) -> None:
    maker = Maker()
    with contextlib.closing(Shared(maker)) as things:
        assert [things.lend(asking(test, failed)) for test in "abc"] == [1, 1, 1]
        assert maker.ended == []
    assert maker.ended == ["well"]


def test_test_behind_a_failed_one_has_another(failed: set[str]) -> None:
    maker = Maker()
    with contextlib.closing(Shared(maker)) as things:
        assert things.lend(asking("a", failed)) == 1
        failed |= {"a"}
        assert things.lend(asking("b", failed)) == 2
        assert things.lend(asking("c", failed)) == 2
        assert maker.ended == [LeftByFailure.__name__]


def test_nothing_is_made_for_nobody() -> None:
    maker = Maker()
    Shared(maker).close()
    assert maker.made == 0


def test_what_cannot_be_made_is_tried_twice(failed: set[str]) -> None:
    tried = []

    @contextlib.contextmanager
    def make() -> Iterator[int]:
        tried.append(1)
        raise OSError("No room")
        yield

    things = Shared(make)
    for test in "ab":
        with pytest.raises(OSError, match="No room"):
            things.lend(asking(test, failed))
        failed |= {test}
    with pytest.raises(pytest.fail.Exception, match="OSError.*No room"):
        things.lend(asking("c", failed))
    assert len(tried) == MOST_FAILURES
