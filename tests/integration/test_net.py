"""Network devices under load, seen from both sides: TCP streams by checksum, rates against their limits.

One guest is shared; each test adds what it is about. Frames and bytes are counted on both sides.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, serving, vm_config
from support.deadline import GUEST_S, HOST_S
from support.device.case import find
from support.device.net_user import configure_by_dhcp
from support.namespace import ip, network_namespace, open_tap, ping, run
from support.rate import assert_rate
from support.shared import shared
from support.stream import stream_from_guest, stream_to_guest
from support.vhost_user_net import VhostUserNet
from support.vmm import Vmm
from support.wait import wait_until
from support.watch import Watch

pytestmark = [pytest.mark.qemu, pytest.mark.root]

COLD, HOT = "192.168.40", "192.168.41"
GUEST_PORT = 5001
TOLERANCE = 0.15
BACK_END_S = 10.0
"""How long a back end is waited for."""


@pytest.fixture(scope="module")
def namespace() -> Iterator[None]:
    with network_namespace():
        ip("link add uplink type veth peer name router")
        ip("link set uplink up")
        ip("link set router up")
        ip("addr add 10.99.0.1/24 dev uplink")
        ip("route add default via 10.99.0.254")
        yield


@shared()
def shared_vm(namespace: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A guest with a network device of each kind, two vCPUs and memory that a back end can map."""
    folder = tmp_path_factory.mktemp("net")
    nets = [
        {"id": "made", "tap": "made0", "ip": f"{COLD}.1", "mask": "255.255.255.0"},
        {"id": "user", "user": {"forwards": ["tcp:127.0.0.1:18081:80", "udp:127.0.0.1:18053:53"]}},
    ]
    config = vm_config(
        cpus={"boot_vcpus": 2, "max_vcpus": 2}, memory={"size": 256 * MIB, "shared": True}, net=nets
    )
    with booting(folder, config) as booted:
        yield booted


@contextlib.contextmanager
def added(vm: Booted, **net: Any) -> Iterator[tuple[str, str]]:
    """Add a network device; give its id and the guest's name of it; it is gone at the end."""
    fds = net.pop("pass_fds", None)
    answer = vm.vmm.put("vm.add-net", net, fds=fds, expect=200)
    try:
        yield answer["id"], find(vm, answer["bdf"], "net")
    finally:
        vm.vmm.put("vm.remove-device", {"id": answer["id"]})
        wait_until(
            lambda: answer["id"] not in vm.info()["device_tree"], "the device is removed", timeout_s=GUEST_S
        )


def up(vm: Booted, name: str, network: str) -> None:
    vm.run(f"ifconfig {name} {network}.2 netmask 255.255.255.0 up")


def device_name(vm: Booted, device_id: str) -> str:
    return find(vm, vm.info()["device_tree"][f"_virtio-pci-{device_id}"]["pci_bdf"], "net")


def check_streams(vm: Booted, network: str, *, mib: int = 4) -> None:
    vm.run(f"ping -c 2 -W 10 {network}.1")
    ping(f"{network}.2")
    stream_from_guest(vm, f"{network}.1", address=f"{network}.1", mib=mib)
    stream_to_guest(vm, (f"{network}.2", GUEST_PORT), GUEST_PORT, mib=mib)


def test_streams_go_both_ways_from_the_boot_on_and_every_frame_is_counted(vm: Booted) -> None:
    name = device_name(vm, "made")
    up(vm, name, COLD)
    check_streams(vm, COLD)
    files = "rx_packets rx_bytes tx_packets tx_bytes"

    def both() -> tuple[list[int], list[int]]:
        counted = vm.vmm.get("vm.counters")["made"]
        seen = vm.run(f"cd /sys/class/net/{name}/statistics && cat {files}").split()
        names = ("rx_frames", "rx_bytes", "tx_frames", "tx_bytes")
        return [counted[each] for each in names], [int(each) for each in seen]

    wait_until(
        lambda: len({tuple(each) for each in both()}) == 1, f"the same counts: {both()}", timeout_s=GUEST_S
    )
    assert both()[0][1] > 4 * MIB
    assert both()[0][3] > 4 * MIB


@pytest.mark.parametrize(
    "net",
    [
        {"tap": "hot0", "ip": f"{HOT}.1", "mask": "255.255.255.0"},
        {"tap": "hot1", "ip": f"{HOT}.1", "mask": "255.255.255.0", "mtu": 9000, "num_queues": 4},
        {
            "ip": f"{HOT}.1",
            "mask": "255.255.255.0",
            "host_mac": "12:34:56:78:90:0f",
            "offload_tso": False,
            "offload_ufo": False,
            "offload_csum": False,
        },
    ],
    ids=["made", "queues", "no-offloads"],
)
def test_streams_go_both_ways_over_a_device_that_is_added(vm: Booted, net: dict[str, Any]) -> None:
    with added(vm, **net) as (_, name):
        up(vm, name, HOT)
        check_streams(vm, HOT, mib=2)


def test_streams_go_both_ways_over_a_tap_that_is_there_or_passed(vm: Booted) -> None:
    ip("tuntap add name there0 mode tap")
    ip(f"addr add {HOT}.1/24 dev there0")
    with added(vm, tap="there0") as (_, name):
        up(vm, name, HOT)
        check_streams(vm, HOT, mib=2)
    ip("link del there0")
    fds = open_tap("passed1", queues=2)
    ip(f"addr add {HOT}.1/24 dev passed1")
    ip("link set passed1 up")
    try:
        with added(vm, pass_fds=fds, num_queues=4) as (_, name):
            up(vm, name, HOT)
            check_streams(vm, HOT, mib=2)
    finally:
        for fd in fds:
            os.close(fd)


def test_bytes_are_limited_in_both_directions(vm: Booted) -> None:
    limit = 1 << 20
    bandwidth = {"size": limit // 8, "refill_time": 125}
    net = {"tap": "limited0", "ip": f"{HOT}.1", "mask": "255.255.255.0"}
    with added(vm, **net, rate_limiter_config={"bandwidth": bandwidth}) as (_, name):
        up(vm, name, HOT)
        assert_rate(lambda: rate_from_guest(vm, mib=4, skipped=MIB), limit, tolerance=TOLERANCE)
        assert_rate(lambda: rate_to_guest(vm, mib=4, burst=limit // 8), limit, tolerance=TOLERANCE)
    assert "cvlim" not in ip("link show")


def test_frames_are_limited_in_both_directions(vm: Booted) -> None:
    frames_per_s, payload_bytes = 400, 1448
    ops = {"size": 40, "refill_time": 100}
    offloads = dict.fromkeys(("offload_tso", "offload_ufo", "offload_csum"), False)
    net = {"tap": "limited1", "ip": f"{HOT}.1", "mask": "255.255.255.0", **offloads}
    with added(vm, **net, rate_limiter_config={"ops": ops}) as (_, name):
        up(vm, name, HOT)
        limit = frames_per_s * payload_bytes
        assert_rate(lambda: rate_from_guest(vm, mib=2, skipped=MIB // 4), limit, tolerance=TOLERANCE)
        assert_rate(lambda: datagrams_per_s("limited1"), frames_per_s, tolerance=TOLERANCE)


def datagrams_per_s(interface: str) -> float:
    """Send as many datagrams as can be; return how many a second leave for the guest, after a first burst."""
    stop = threading.Event()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect((f"{HOT}.2", GUEST_PORT))
            while not stop.is_set():
                with contextlib.suppress(ConnectionRefusedError):  # nobody is there
                    sender.send(bytes(1000))

    def taken(count: int) -> float:
        wait_until(lambda: frames_to(interface) >= count, f"{count} frames have left", timeout_s=HOST_S)
        return time.monotonic()

    thread = threading.Thread(target=send, name="datagrams")
    thread.start()
    try:
        start = frames_to(interface) + 200
        started = taken(start)
        return 1200 / (taken(start + 1200) - started)
    finally:
        stop.set()
        thread.join()


def frames_to(interface: str) -> int:
    table = Path("/proc/thread-self/net/dev").read_text()
    (line,) = (line for line in table.splitlines() if line.strip().startswith(f"{interface}:"))
    return int(line.split()[10])


def rate_from_guest(vm: Booted, *, mib: int, skipped: int) -> float:
    return stream_from_guest(vm, f"{HOT}.1", address=f"{HOT}.1", mib=mib).bytes_per_s(skipped=skipped)


def rate_to_guest(vm: Booted, *, mib: int, burst: int) -> float:
    seconds = stream_to_guest(vm, (f"{HOT}.2", GUEST_PORT), GUEST_PORT, mib=mib)
    return (mib * MIB - burst) / seconds


def test_limits_are_gone_from_a_tap_that_stays(vm: Booted) -> None:
    ip("tuntap add name stays0 mode tap")
    bandwidth = {"size": MIB, "refill_time": 100}
    with added(vm, tap="stays0", rate_limiter_config={"bandwidth": bandwidth}):
        assert "qdisc tbf" in ip("link show dev stays0")
    shown = ip("link show")
    assert "stays0" in shown
    assert "tbf" not in shown
    assert "cvlim" not in shown
    ip("link del stays0")


def test_user_mode_networking_reaches_the_host_and_is_reached(vm: Booted) -> None:
    name = device_name(vm, "user")
    configure_by_dhcp(vm, name)
    stream_from_guest(vm, "10.0.2.2", address="127.0.0.1", mib=2)
    stream_to_guest(vm, ("127.0.0.1", 18081), 80, mib=2)
    assert "user" not in vm.vmm.get("vm.counters")


def test_passt_serves_where_a_good_one_is_installed(
    namespace: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of Debian 12 is not; what is asked of it here, it can."""
    program = shutil.which("passt")
    if program is None:
        pytest.skip("passt is missing")
    wrapper = tmp_path / "bin" / "passt"
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" != --version ] || exec echo passt 2024_06_07.8a83b53\nexec {program} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    net = {"id": "user", "mtu": 1400, "user": {"forwards": ["tcp:127.0.0.1:18083:83"]}}
    with booting(tmp_path / "run", vm_config(net=[net])) as vm:
        assert "passt" in {Path(child.command.split()[0]).name for child in vm.server.children()}
        name = device_name(vm, "user")
        configure_by_dhcp(vm, name)
        assert vm.run(f"cat /sys/class/net/{name}/mtu") == "1400"
        stream_from_guest(vm, "10.0.2.2", address="127.0.0.1", mib=2)
        content = os.urandom(2 * MIB)
        vm.run("(nc -l -p 83 </dev/zero >/dev/null) 2>/dev/null &")
        vm.run("until grep -q ':0053 .* 0A ' /proc/net/tcp /proc/net/tcp6; do usleep 20000; done")
        with socket.create_connection(("127.0.0.1", 18083), timeout=20) as connection:
            connection.sendall(content)
            assert connection.recv(4096).strip(b"\0") == b""
        (passt,) = (child for child in vm.server.children() if "passt" in child.command)
        vm.vmm.put("vm.remove-device", {"id": "user"})
        wait_until(lambda: not os.path.exists(f"/proc/{passt.pid}"), "passt is gone", timeout_s=HOST_S)


def test_datagram_goes_through_a_forward(vm: Booted) -> None:
    count = "awk '/^Udp: [0-9]/ { print $3 }' /proc/net/snmp"  # of those for which there is nobody
    before = int(vm.run(count))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", ("127.0.0.1", 18053))
    wait_until(lambda: int(vm.run(count)) == before + 1, "the datagram has come", timeout_s=GUEST_S)


def test_user_mode_networking_is_added_and_gone_with_its_port(vm: Booted) -> None:
    before = {child.pid for child in vm.server.children()}
    vm.run(f"ifconfig {device_name(vm, 'user')} 0.0.0.0 down")
    with added(vm, user={"forwards": ["tcp:127.0.0.1:18082:81"]}) as (_, name):
        configure_by_dhcp(vm, name)
        stream_to_guest(vm, ("127.0.0.1", 18082), 81, mib=1)
        with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", 18082)):
            pass
    wait_until(
        lambda: {child.pid for child in vm.server.children()} == before,
        "its helper is gone",
        timeout_s=HOST_S,
    )
    socket.create_server(("127.0.0.1", 18082)).close()


@pytest.mark.parametrize("mode", ["Client", "Server"])
def test_streams_go_both_ways_over_a_vhost_user_back_end(vm: Booted, tmp_path: Path, mode: str) -> None:
    (tap,) = open_tap("back0", has_header=False)
    ip(f"addr add {HOT}.1/24 dev back0")
    ip("link set back0 up")
    backend = VhostUserNet(tmp_path / "s", tap, connects=mode == "Server")
    try:
        net = {"vhost_user": True, "vhost_socket": str(backend.path), "vhost_mode": mode, "queue_size": 1024}
        with added(vm, **net, num_queues=4) as (_, name):
            up(vm, name, HOT)
            check_streams(vm, HOT, mib=1)
        assert backend.connections == 1
    finally:
        backend.close()
        os.close(tap)
    assert not (tmp_path / "s").exists()


BAD = {
    "busy": ({"tap": "made0"}, 500, "Device or resource busy"),
    "no-tap": ({"tap": "lo"}, 500, "Invalid argument"),
    "long-name": ({"tap": "a-name-of-16-byte"}, 500, "is not valid"),
    "other-queues": ({"tap": "made1", "num_queues": 4}, 500, "was made for one queue"),
    "own-limits": (
        {"tap": "made1", "rate_limiter_config": {"bandwidth": {"size": 1, "refill_time": 1}}},
        500,
        "has a traffic control of its own",
    ),
    "bad-mask": ({"ip": "fd00::1", "mask": "ffff:0:ffff::"}, 500, "Invalid netmask"),
    "taken-port": ({"user": {"forwards": ["tcp:127.0.0.1:18081:80"]}}, 500, "Address already in use"),
    "taken-udp-port": ({"user": {"forwards": ["udp:127.0.0.1:18053:80"]}}, 500, "Address already in use"),
    "not-our-address": ({"user": {"forwards": ["tcp:192.0.2.1:80:80"]}}, 500, "Cannot assign"),
    "no-forward": ({"user": {"forwards": ["tcp:8080:80"]}}, 400, '"tcp:8080:80" is not valid'),
    "no-port": ({"user": {"forwards": ["tcp:127.0.0.1:0:80"]}}, 400, "is not valid"),
    "same-port": (
        {"user": {"forwards": ["tcp:127.0.0.1:99:80", "tcp:127.0.0.1:99:81"]}},
        400,
        "of another one",
    ),
    "user-and-tap": ({"tap": "x", "user": {}}, 400, "User-mode networking excludes tap"),
    "user-queues": ({"num_queues": 4, "user": {}}, 400, "has 2 queues, not 4"),
    "not-a-socket-but-a-folder": ({"vhost_user": True, "vhost_socket": "/"}, 500, "Connection refused: /"),
    "socket-name-too-long": ({"vhost_user": True, "vhost_socket": "/" + 200 * "x"}, 500, "too long"),
    "nowhere-to-listen": (
        {"vhost_user": True, "vhost_socket": "/no/such/folder", "vhost_mode": "Server"},
        500,
        "No such file",
    ),
}


@pytest.fixture(scope="module")
def limited_tap(namespace: None) -> Iterator[None]:
    """A TAP with a traffic control of its own."""
    ip("tuntap add name made1 mode tap")
    run("tc qdisc add dev made1 ingress")
    yield
    ip("link del made1")


@pytest.mark.parametrize("case", BAD)
def test_bad_device_is_refused_with_the_reason_and_nothing_changes(
    vm: Booted, limited_tap: None, case: str
) -> None:
    net, status, words = BAD[case]
    before = held(vm)
    chain = vm.vmm.put("vm.add-net", net, expect=status)
    assert words in " <- ".join(chain)
    wait_until(lambda: held(vm) == before, f"all is as before: {before}", timeout_s=GUEST_S)


def held(vm: Booted) -> tuple[Any, ...]:
    info = vm.info()
    children = {child.pid for child in vm.server.children()}
    links = sorted(line.split()[0] for line in ip("-brief link show").splitlines())
    return info["config"], info["device_tree"].keys(), links, children


@pytest.mark.parametrize("is_hot", [False, True], ids=["boot", "hot"])
def test_wait_for_a_back_end_does_not_keep_the_server_from_leaving(tmp_path: Path, is_hot: bool) -> None:
    net = {"vhost_user": True, "vhost_socket": str(tmp_path / "s"), "vhost_mode": "Server"}
    config = vm_config(memory={"size": 128 * MIB, "shared": True})
    with serving(tmp_path / "vm") as vm:
        vm.vmm.put("vm.create", config if is_hot else config | {"net": [net]})
        if is_hot:
            vm.vmm.put("vm.boot")
        command = ("vm.add-net", net) if is_hot else ("vm.boot",)
        with vm.vmm.second() as other:
            waiting = threading.Thread(target=ask, args=(other, *command))
            waiting.start()
            wait_until((tmp_path / "s").exists, "the server listens", timeout_s=HOST_S)
            with Watch() as watch:
                vm.vmm.put("vmm.shutdown")
            assert watch.elapsed_s < BACK_END_S / 2
            waiting.join()
    assert not (tmp_path / "s").exists()


def ask(vmm: Vmm, *command: Any) -> None:
    with contextlib.suppress(OSError, EOFError):  # the server leaves meanwhile
        vmm.exchange("PUT", *command)
