"""What the soak calls a leak."""

from __future__ import annotations

import pytest

from soak import Held, leaks

STEADY = Held(descriptors=20, threads=5, children=0, rss_mib=25.0)


def lives(*held: Held) -> list[tuple[float, Held]]:
    return [(float(at), one) for at, one in enumerate(held)]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (STEADY._replace(descriptors=21), "descriptors: 21 after 20"),
        (STEADY._replace(threads=6), "threads: 6 after 5"),
        (STEADY._replace(children=1), "children: 1 after 0"),
        (STEADY._replace(rss_mib=27.1), "memory: 27.1 MiB after 25.0"),
    ],
)
def test_what_stays_more_is_a_leak(last: Held, words: str) -> None:
    assert leaks(lives(*[STEADY] * 6, *[last] * 3)) == [words]


def test_what_goes_again_and_a_little_memory_are_no_leak() -> None:
    more = STEADY._replace(descriptors=25, rss_mib=25.9)
    assert leaks(lives(*[STEADY] * 6, more, more, STEADY._replace(rss_mib=25.9))) == []


def test_warm_up_and_too_few_lives_say_nothing() -> None:
    cold = STEADY._replace(descriptors=10, rss_mib=15.0)
    assert leaks(lives(cold, cold, *[STEADY] * 4)) == []
    assert leaks(lives(cold, STEADY)) == []
