"""A guest goes to another host and back: two network namespaces, each with its own address, bridge and TAP.

What the guest sends over TCP to the first host arrives without a gap, wherever it is, and by whatever way it
came there.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloudvmm.host import userfault
from support.booted import MIB, make_image, vm_config
from support.certificate import Authority
from support.deadline import GUEST_S
from support.namespace import Host, ip, network_namespace, other_host
from support.traveller import Traveller
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

HERE, THERE, GUEST = "10.99.0.1", "10.99.0.2", "10.99.0.10"
HERE_6, THERE_6 = "fd99::1", "fd99::2"
PORT = 4444
ROUNDS = 50


class Way(msgspec.Struct, frozen=True):
    """How the guest goes: `send` is what is asked for besides, and `both` at either side.

    With `is_local` it stays on its host.
    """

    url: str
    send: dict[str, Any] = {}
    both: dict[str, Any] = {}
    is_tls: bool = False
    is_local: bool = False


# {host} is the address that the guest goes to, {port} a port there, {folder} one that both see.
WAYS = {
    "unix": Way("unix:{folder}/way"),
    "local": Way("unix:{folder}/way", {"local": True}, is_local=True),
    "tcp": Way("tcp:{host}:{port}"),
    "TLS": Way("tcp:{host}:{port}", is_tls=True),
    "several connections": Way("tcp:{host}:{port}", {"connections": 4}),
    "TLS over several connections": Way("tcp:{host}:{port}", {"connections": 2}, is_tls=True),
}
if userfault.refusal() is None:
    WAYS["postcopy"] = Way("tcp:{host}:{port}", both={"memory_mode": "Postcopy"})
    WAYS["postcopy over TLS"] = Way("tcp:{host}:{port}", both={"memory_mode": "Postcopy"}, is_tls=True)


class Stream:
    """Takes the numbers that a guest counts up to, over one TCP connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HERE, 0))
        self._listener.settimeout(GUEST_S)
        self.port = self._listener.getsockname()[1]
        self.last = 0
        self.fault = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_more(self) -> None:
        """Return once a number came that was not there before."""
        before = self.last
        wait_until(lambda: self.last > before or self.fault, "the stream goes on", timeout_s=GUEST_S)
        assert not self.fault

    def close(self) -> None:
        self._listener.close()

    def _run(self) -> None:
        try:
            sock, _ = self._listener.accept()
            with sock, sock.makefile("r") as lines:
                for line in lines:
                    if int(line) != self.last + 1:
                        self.fault = f"{line!r} came after {self.last}"
                        return
                    self.last += 1
            self.fault = "the stream ended"
        except (OSError, ValueError) as error:
            self.fault = repr(error)


@pytest.fixture
def there() -> Iterator[Host]:
    """Another host; the two are joined by a cable between their bridges."""
    with network_namespace(), other_host() as other:
        ip(f"link add cable type veth peer name cable netns {other.pid}")
        bridge(HERE, HERE_6)
        with other.entered():
            bridge(THERE, THERE_6)
        yield other


def bridge(address: str, address_6: str) -> None:
    ip("link add bridge type bridge forward_delay 0")
    ip("tuntap add name moving mode tap")
    for name in ("cable", "moving"):
        ip(f"link set {name} master bridge up")
    switch = Path("/proc/sys/net/ipv6/conf/bridge/disable_ipv6")
    if switch.exists():
        switch.write_text("0")
        ip(f"addr add {address_6}/64 dev bridge nodad")
    ip(f"addr add {address}/24 dev bridge")
    ip("link set bridge up")


def count_over(traveller: Traveller, stream: Stream) -> None:
    """Have the guest count, and tell each number, over one connection."""
    traveller.place.run(f"ifconfig eth0 {GUEST} netmask 255.255.255.0 up")
    count = "(n=0; while :; do n=$((n+1)); echo $n; usleep 10000; done)"
    traveller.place.run(f"({count} | nc {HERE} {stream.port}) >/dev/null 2>&1 &")
    stream.wait_more()


@contextlib.contextmanager
def on_its_way(folder: Path) -> Iterator[tuple[Traveller, Stream]]:
    """Give a guest under load, and what it says over the network; in the end its disk is what it wrote."""
    disk = make_image(folder / "disk", 4 * MIB)
    config = vm_config(
        memory={"size": 256 * MIB, "shared": True},
        disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}],
        net=[{"id": "n", "tap": "moving"}],
    )
    with contextlib.ExitStack() as undo:
        traveller = Traveller(folder, config, undo)
        traveller.load()
        stream = Stream()
        undo.callback(stream.close)
        count_over(traveller, stream)
        yield traveller, stream
        traveller.rest(disk)


def test_guest_goes_to_another_host_and_back(there: Host, tmp_path: Path) -> None:
    has_ipv6 = Path("/proc/sys/net/ipv6").exists()
    with on_its_way(tmp_path) as (traveller, stream):
        with there.entered():
            target = traveller.next_place()

        traveller.move(f"tcp:[{THERE_6}]:{PORT}" if has_ipv6 else f"tcp:{THERE}:{PORT}", to=target)

        stream.wait_more()
        traveller.check()
        traveller.move(f"tcp:{HERE}:{PORT}", connections=2)
        stream.wait_more()
        traveller.check()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_guest_goes_to_and_fro_all_ways(there: Host, tmp_path: Path) -> None:
    tls = {"tls_dir": Authority(tmp_path / "ca", HERE, THERE).tls_dir}
    is_there = False
    with on_its_way(tmp_path) as (traveller, stream):
        for number, way in zip(range(ROUNDS), itertools.cycle(WAYS.values())):
            is_there = is_there if way.is_local else not is_there
            with there.entered() if is_there else contextlib.nullcontext():
                target = traveller.next_place()
            url = way.url.format(host=THERE if is_there else HERE, port=PORT + number, folder=tmp_path)
            more = {**way.both, **(tls if way.is_tls else {})}

            traveller.move(url, more, to=target, **way.send, **more)

            stream.wait_more()
            traveller.check()
