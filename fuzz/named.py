"""Targets of several grammars: the first line of an input names one of them, the rest is for that one.

What has sockets is fed by `fed`: all that the other side will ever say is there before we read.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
from collections.abc import Callable, Hashable, Iterator

from cloudvmm.errors import error_chain, json_text
from runner import Target

Check = Callable[[bytes], Hashable]
MOST_PIECES = 8


def named_target(
    name: str,
    checks: dict[str, Check],
    *,
    share: float,
    words: tuple[bytes, ...] = (),
    mutate: Callable[[bytes, random.Random], bytes] | None = None,
) -> Target:
    """Return a target of `checks`; `mutate` is given what is behind the first line."""

    def check(data: bytes) -> Hashable:
        first, _, rest = data.partition(b"\n")
        found = checks.get(first.decode(errors="replace"))
        return None if found is None else (first, found(rest))

    def change(data: bytes, noise: random.Random) -> bytes:
        first, _, rest = data.partition(b"\n")
        assert mutate is not None
        return first + b"\n" + mutate(rest, noise)

    return Target(name, check, words=words, mutate=None if mutate is None else change, share=share)


@contextlib.contextmanager
def fed(data: bytes) -> Iterator[socket.socket]:
    """Yield our end of a connection over which `data` has come, and then the end; nobody reads the other."""
    near, far = socket.socketpair()
    with near, far:
        far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        yield near


def cut(data: bytes) -> list[bytes]:
    """Cut at places that depend on the data alone, so that a file says it all."""
    places = sorted(
        len(data) * byte // 256 for byte in hashlib.blake2b(data, digest_size=MOST_PIECES).digest()
    )
    edges = [0, *places, len(data)]
    return [data[edges[at] : edges[at + 1]] for at in range(len(edges) - 1)]


def words_of(error: Exception) -> Hashable:
    """Return what kind of refusal it is; its texts must be texts."""
    chain = error_chain(error)
    assert all(text and json_text(text).encode() for text in chain)
    return type(error).__name__, re.sub(r"\d+|['`(\"][^'`)\"]*['`)\"]", "", chain[-1])[:50]
