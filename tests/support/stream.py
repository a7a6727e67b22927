"""TCP streams between the tests and a guest, checked by their content or measured."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator

from support.booted import MIB, Booted
from support.deadline import GUEST_S

_CHUNK = 65536


class Arrival:
    """What came over one connection: its checksum, and when how much of it was there."""

    def __init__(self) -> None:
        self.digest = ""
        self.times: list[tuple[float, int]] = []

    def bytes_per_s(self, *, skipped: int) -> float:
        """Return the rate behind the first `skipped` bytes, which may have come in a burst."""
        start = next(point for point in self.times if point[1] >= skipped)
        end = self.times[-1]
        return (end[1] - start[1]) / (end[0] - start[0])


@contextlib.contextmanager
def listening(address: str) -> Iterator[tuple[int, Arrival]]:
    """Take one connection at a free port of `address`; at the end all of it has arrived."""
    arrival = Arrival()
    with socket.create_server((address, 0)) as listener:
        listener.settimeout(GUEST_S)
        thread = threading.Thread(target=_receive, args=(listener, arrival), name="stream")
        thread.start()
        try:
            yield listener.getsockname()[1], arrival
        except BaseException:
            listener.shutdown(socket.SHUT_RDWR)  # nobody will come
            raise
        finally:
            thread.join(GUEST_S)
    assert not thread.is_alive()
    assert arrival.digest


def _receive(listener: socket.socket, arrival: Arrival) -> None:
    try:
        connection, _ = listener.accept()
    except OSError:
        return
    connection.settimeout(GUEST_S)
    digest, count = hashlib.md5(), 0
    with connection:
        while piece := connection.recv(_CHUNK):
            digest.update(piece)
            count += len(piece)
            arrival.times.append((time.monotonic(), count))
    arrival.digest = digest.hexdigest()


def stream_from_guest(vm: Booted, target: str, *, address: str, mib: int) -> Arrival:
    """Let the guest send random bytes to `target`, which is our `address`; fail unless they arrive whole."""
    with listening(address) as (port, arrival):
        sent = vm.run(
            f"dd if=/dev/urandom of=/tmp/out bs=1M count={mib} 2>/dev/null && "
            f"nc {target} {port} </tmp/out && md5sum </tmp/out && rm /tmp/out"
        )
    assert sent.split()[0] == arrival.digest
    return arrival


def stream_to_guest(vm: Booted, target: tuple[str, int], guest_port: int, *, mib: int) -> float:
    """Send random bytes to `target`, behind which the guest is; fail unless they arrive whole.

    Returns the seconds that it took until the guest had them all.
    """
    content = os.urandom(mib * MIB)
    # Its input stays open, so that the guest hangs up when it has everything.
    vm.run("rm -f /tmp/done; test -e /tmp/open || mkfifo /tmp/open")
    vm.run(f"(nc -l -p {guest_port} <>/tmp/open >/tmp/in; touch /tmp/done) 2>/dev/null &")
    vm.run(f"until grep -q ':{guest_port:04X} .* 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 20000; done")
    started = time.monotonic()
    with socket.create_connection(target, timeout=GUEST_S) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    took_s = time.monotonic() - started
    got = vm.run("until test -e /tmp/done; do usleep 20000; done; md5sum </tmp/in; rm /tmp/in")
    assert got.split()[0] == hashlib.md5(content).hexdigest()
    return took_s
