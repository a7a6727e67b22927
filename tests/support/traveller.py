"""A guest under load that moves from server to server, and what it must still have wherever it is."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from support.booted import Booted, Config, booting, serving
from support.deadline import GUEST_S
from support.server import Server

HOST = "127.0.0.1"
DISK_BYTES = 64 * 1024

# Two loads, each of which checks itself: what is in memory against its sums, and what is on the disk.
_LOAD = """
mkdir -p /tmp/load; cd /tmp/load; rm -f stop still rested
head -c 4m /dev/urandom >kept; md5sum kept >kept.sum
(n=0; while [ ! -e stop ]; do
  n=$((n+1)); f=$((n%4))
  dd if=/dev/urandom of=$f bs=64k count=4 2>/dev/null; md5sum $f >$f.sum; md5sum -c -s $f.sum || echo $n >>bad
  echo $n >turn.new; mv turn.new turn
done; touch rested) >/dev/null 2>&1 &
(while [ ! -e stop ]; do
  head -c 64k /dev/urandom >page
  dd if=page of=/dev/vda bs=64k conv=fsync && cp page written
done; touch still) >/dev/null 2>&1 &
"""
# Writes over more memory than a slow link carries, again and again.
_FLOOD = """
(while [ ! -e /tmp/load/calm ]; do dd if=/dev/zero of=/tmp/load/flood bs=1M count=32 2>/dev/null; done
rm -f /tmp/load/calm /tmp/load/flood) >/dev/null 2>&1 &
"""
_TWO_TURNS = """
cd /tmp/load; until [ -e turn ]; do usleep 50000; done
n=$(($(cat turn)+2)); until [ $(cat turn) -ge $n ]; do usleep 50000; done
[ ! -e bad ] && md5sum -c -s kept.sum
"""
_REST = """
cd /tmp/load; touch stop; until [ -e still ] && [ -e rested ]; do usleep 50000; done
[ ! -e bad ] && md5sum -c -s kept.sum
"""


def begin_load(guest: Booted) -> None:
    """Have the guest write to its memory and its disk from now on."""
    guest.run(_LOAD, timeout_s=GUEST_S)


def check_load(guest: Booted) -> None:
    """Fail unless the load goes on, and all in the guest is as it was written."""
    assert guest.info()["state"] == "Running"
    guest.run(_TWO_TURNS, timeout_s=GUEST_S)


def end_load(guest: Booted, disk: Path) -> None:
    """Stop the load and compare what the guest wrote last with what `disk` holds."""
    guest.run(_REST, timeout_s=GUEST_S)
    wrote = guest.run("md5sum </tmp/load/written", timeout_s=GUEST_S).split()[0]
    with disk.open("rb") as file:
        assert hashlib.md5(file.read(DISK_BYTES)).hexdigest() == wrote


class Traveller:
    """A booted guest; `place` is the server where it is. `flags` are those of every server."""

    def __init__(
        self, folder: Path, config: Config, undo: contextlib.ExitStack, flags: Sequence[str] = ()
    ) -> None:
        self._folder = folder
        self._undo = undo
        self._flags = flags
        self._numbers = itertools.count(1)
        self.place = undo.enter_context(booting(folder / "0", config, *flags))

    def load(self) -> None:
        begin_load(self.place)

    def flood(self) -> None:
        """Have the guest write to its memory as fast as it can, until `calm`."""
        self.place.run(_FLOOD, timeout_s=GUEST_S)

    def calm(self) -> None:
        self.place.run("touch /tmp/load/calm", timeout_s=GUEST_S)

    def check(self) -> None:
        check_load(self.place)

    def rest(self, disk: Path) -> None:
        end_load(self.place, disk)

    def next_place(self) -> Booted:
        """Return a fresh server."""
        return self._undo.enter_context(serving(self._folder / str(next(self._numbers)), *self._flags))

    def move(
        self,
        url: str,
        receive: dict[str, Any] | None = None,
        *,
        to: Booted | None = None,
        at: str | None = None,
        **send: Any,
    ) -> dict[str, Any]:
        """Move to a fresh server, or `to`, which the source finds at `url`, or `at`.

        Return how the destination says that it went.
        """
        source, target = self.place, to or self.next_place()
        arrive = receiving(target, url, receive or {})
        source.vmm.put("vm.send-migration", {"destination_url": at or url, **send}, expect=204)
        arrive()
        source.server.wait_end(timeout_s=GUEST_S)
        self.place = target
        target.open_shell()
        target.wait_ready()
        told: dict[str, Any] = target.vmm.get("vm.migration-progress")
        return told


def is_settled(source: Server) -> bool:
    """Tell whether a sender has ended, or has its VM back."""
    if not source.is_running:
        return True
    try:
        return source.vmm.exchange("GET", "vm.counters").status == 200
    except (OSError, EOFError):
        return False  # it is about to end


def tcp_url() -> str:
    """Return an address of this host at which nobody listens."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return f"tcp:{HOST}:{sock.getsockname()[1]}"


def receiving(
    target: Booted, url: str, data: dict[str, Any], *, expect: int = 204, fds: list[int] | None = None
) -> Callable[[], Any]:
    """Have `target` wait for a VM at `url`; what is returned waits for the answer, and returns it.

    `fds` go along with the command; lent.
    """
    outcome: list[Any] = []

    def receive() -> None:
        try:
            with target.vmm.second() as other:
                body = {"receiver_url": url, **data}
                outcome.append(other.put("vm.receive-migration", body, expect=expect, fds=fds))
        except BaseException as error:
            outcome.append(error)

    before = target.events.names().count("vm/migration-receive-ready")
    thread = threading.Thread(target=receive)
    thread.start()
    target.events.wait("vm/migration-receive-ready", count=before + 1, timeout_s=GUEST_S)

    def finish() -> Any:
        thread.join(GUEST_S)
        assert outcome, "vm.receive-migration was never answered"
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    return finish
