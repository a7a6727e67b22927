"""A guest goes to another host and back: two network namespaces, each with its own address, bridge and TAP.

What the guest sends over TCP to the first host arrives without a gap, wherever it is.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.booted import MIB, make_image, vm_config
from support.deadline import GUEST_S
from support.namespace import Host, ip, network_namespace, other_host
from support.traveller import Traveller
from support.wait import wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.root]

HERE, THERE, GUEST = "10.99.0.1", "10.99.0.2", "10.99.0.10"
HERE_6, THERE_6 = "fd99::1", "fd99::2"
PORT = 4444


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


def test_guest_goes_to_another_host_and_back(there: Host, tmp_path: Path) -> None:
    disk = make_image(tmp_path / "disk", 4 * MIB)
    config = vm_config(
        disks=[{"id": "d", "path": str(disk), "image_type": "Raw"}], net=[{"id": "n", "tap": "moving"}]
    )
    has_ipv6 = Path("/proc/sys/net/ipv6").exists()
    with contextlib.ExitStack() as undo:
        traveller = Traveller(tmp_path, config, undo)
        traveller.load()
        stream = Stream()
        undo.callback(stream.close)
        traveller.place.run(f"ifconfig eth0 {GUEST} netmask 255.255.255.0 up")
        count = "(n=0; while :; do n=$((n+1)); echo $n; usleep 10000; done)"
        traveller.place.run(f"({count} | nc {HERE} {stream.port}) >/dev/null 2>&1 &")
        stream.wait_more()
        with there.entered():
            target = traveller.next_place()

        traveller.move(f"tcp:[{THERE_6}]:{PORT}" if has_ipv6 else f"tcp:{THERE}:{PORT}", to=target)

        stream.wait_more()
        traveller.check()
        traveller.move(f"tcp:{HERE}:{PORT}", connections=2)
        stream.wait_more()
        traveller.check()
        traveller.rest(disk)
