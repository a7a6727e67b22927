"""Disks in a real guest: rates, sizes, back ends, locks, discards and counters, seen from both sides.

One guest serves most tests, each with disks of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.booted import MIB, Booted, booting, make_image, serving, vm_config
from support.device.case import GUEST_S, find
from support.rate import assert_rate
from support.shared import shared
from support.storage_daemon import StorageDaemon
from support.wait import wait_until

pytestmark = [pytest.mark.qemu]

NEAR = 0.15
BYTES_PER_S = MIB
OPS_PER_S = 40  # under emulation on a busy host, a request may take ten milliseconds
COLD = ("cold", "member", "kept")


def bucket(size: int, *, refill_time: int = 1000, burst: int = 0) -> dict[str, int]:
    return {"size": size, "refill_time": refill_time, "one_time_burst": burst}


def limited(**buckets: dict[str, int]) -> dict[str, Any]:
    return {"rate_limiter_config": buckets}


@shared()
def shared_vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    folder = tmp_path_factory.mktemp("disk")
    config = vm_config(
        cpus={"boot_vcpus": 2, "max_vcpus": 2},
        memory={"size": 256 * MIB, "shared": True},
        rate_limit_groups=[{"id": "shared", **limited(bandwidth=bucket(BYTES_PER_S))}],
        disks=[
            raw(folder, "cold", **limited(bandwidth=bucket(BYTES_PER_S))),
            raw(folder, "member", rate_limit_group="shared"),
            raw(folder, "kept", queue_affinity=[{"queue_index": 0, "host_cpus": [0]}]),
        ],
    )
    with booting(folder, config) as booted:
        yield booted


@pytest.fixture(autouse=True)
def clear(vm: Booted) -> Iterator[None]:
    """Remove what a test that failed has left, so that it alone fails."""
    yield
    for disk in vm.config()["disks"]:
        if disk["id"] not in COLD:
            remove(vm, disk["id"])


def raw(folder: Path, disk_id: str, size_bytes: int = 64 * MIB, **options: Any) -> dict[str, Any]:
    path = make_image(folder / f"{disk_id}.raw", size_bytes)
    return {"id": disk_id, "path": str(path), "image_type": "Raw", "serial": disk_id, **options}


def add(vm: Booted, disk: dict[str, Any]) -> str:
    """Add `disk`; return the guest's name of it."""
    answer = vm.vmm.put("vm.add-disk", disk, expect=200)
    return find(vm, answer["bdf"], "block")


def named(vm: Booted, disk_id: str) -> str:
    """Return the guest's name of the disk `disk_id`, whose serial is its id."""
    return vm.run(f"cd /sys/block; grep -lx {disk_id} */serial").split("/")[0]


def remove(vm: Booted, disk_id: str) -> None:
    vm.vmm.put("vm.remove-device", {"id": disk_id}, expect=204)
    wait_until(lambda: disk_id not in vm.info()["device_tree"], f"{disk_id} is removed", timeout_s=GUEST_S)


def seconds(vm: Booted, script: str) -> float:
    """Run `script` in the guest; return how long it took by the guest's clock."""
    output = vm.run(f"cut -d' ' -f1 /proc/uptime; {{ {script}; }} >&2; cut -d' ' -f1 /proc/uptime")
    before, after = output.split()[0], output.split()[-1]
    return float(after) - float(before)


def move(name: str, *, count: int, block: str, write: bool = True) -> str:
    """Return a script that moves `count` blocks by requests of that size, past the guest's cache."""
    ends = (
        f"if=/dev/zero of=/dev/{name} oflag=direct" if write else f"if=/dev/{name} of=/dev/null iflag=direct"
    )
    return f"dd {ends} bs={block} count={count} 2>/dev/null"


def ops_per_s(vm: Booted, name: str, *, full: int, count: int) -> float:
    """Return how many operations a second the disk does when the `full` of its bucket are done."""
    vm.run(move(name, count=full, block="4k"))
    return count / seconds(vm, move(name, count=count, block="4k"))


class TestRates:
    @pytest.mark.parametrize("write", [True, False], ids=["write", "read"])
    def test_bandwidth_of_a_cold_disk_is_the_limit(self, vm: Booted, write: bool) -> None:
        name = named(vm, "cold")

        def measure() -> float:
            vm.run(move(name, count=16, block="64k", write=write))  # the bucket was full
            return 4 * MIB / seconds(vm, move(name, count=64, block="64k", write=write))

        assert_rate(measure, BYTES_PER_S, tolerance=NEAR)

    def test_operations_of_a_hot_disk_are_the_limit_and_go_with_it(self, vm: Booted, tmp_path: Path) -> None:
        disk = raw(tmp_path, "counted", **limited(ops=bucket(OPS_PER_S)))
        name = add(vm, disk)
        assert_rate(
            lambda: ops_per_s(vm, name, full=OPS_PER_S, count=4 * OPS_PER_S), OPS_PER_S, tolerance=NEAR
        )
        remove(vm, "counted")
        half = OPS_PER_S // 2
        again = add(vm, disk | limited(ops=bucket(half)))
        assert_rate(lambda: ops_per_s(vm, again, full=half, count=OPS_PER_S), half, tolerance=NEAR)
        remove(vm, "counted")

    def test_cold_and_hot_disk_of_a_group_share_its_limit(self, vm: Booted, tmp_path: Path) -> None:
        cold, hot = named(vm, "member"), add(vm, raw(tmp_path, "joined", rate_limit_group="shared"))
        both = " & ".join(move(name, count=32, block="64k") for name in (cold, hot))
        alone = move(cold, count=64, block="64k")

        def measure(script: str) -> float:
            vm.run(move(cold, count=16, block="64k"))  # the bucket filled meanwhile
            return 4 * MIB / seconds(vm, script)

        assert_rate(lambda: measure(f"{both} & wait"), BYTES_PER_S, tolerance=NEAR)
        remove(vm, "joined")
        assert_rate(lambda: measure(alone), BYTES_PER_S, tolerance=NEAR)

    def test_bucket_holds_what_refills_in_its_time(self, vm: Booted, tmp_path: Path) -> None:
        """4 MiB refill within 4 s: so many at once, and then 1 MiB/s."""
        disk = raw(tmp_path, "deep", **limited(bandwidth=bucket(4 * MIB, refill_time=4000)))

        def measure() -> float:
            name = add(vm, disk)
            taken_s = seconds(vm, f"{move(name, count=4, block='1M')}; {move(name, count=64, block='64k')}")
            remove(vm, "deep")
            return 4 * MIB / taken_s

        assert_rate(measure, BYTES_PER_S, tolerance=NEAR)

    def test_one_time_burst_is_spent_first_and_once(self, vm: Booted, tmp_path: Path) -> None:
        disk = raw(tmp_path, "once", **limited(bandwidth=bucket(BYTES_PER_S, burst=8 * MIB)))
        name = ""

        def measure_first() -> float:
            """8 MiB of burst and 1 MiB of the bucket at once, and then 1 MiB/s."""
            nonlocal name
            if name:
                remove(vm, "once")
            name = add(vm, disk)
            taken_s = seconds(vm, f"{move(name, count=8, block='1M')}; {move(name, count=80, block='64k')}")
            return 4 * MIB / taken_s

        def measure_again() -> float:
            vm.run("sleep 3")  # more than a second refills no more than the bucket
            return (5 * MIB - BYTES_PER_S) / seconds(vm, move(name, count=80, block="64k"))

        assert_rate(measure_first, BYTES_PER_S, tolerance=NEAR)
        assert_rate(measure_again, BYTES_PER_S, tolerance=NEAR)
        remove(vm, "once")


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "status", "words"),
        [
            pytest.param(
                {"path": "/sys/kernel/notes"},  # which not even root may write
                500,
                "Permission denied (os error 13)",
                marks=pytest.mark.skipif(not os.path.exists("/sys/kernel/notes"), reason="/sys is not there"),
            ),
            ({"path": "/proc/self"}, 500, "Is a directory (os error 21)"),
            ({"path": "{folder}/link"}, 500, "No such file or directory (os error 2)"),
            ({"rate_limit_group": "none"}, 400, "Invalid rate-limiter group"),
            (limited(ops=bucket(1)) | {"rate_limit_group": "shared"}, 400, "Invalid rate-limiter group"),
        ],
    )
    def test_disk_that_cannot_be_had_leaves_all_as_before(
        self, vm: Booted, tmp_path: Path, options: dict[str, Any], status: int, words: str
    ) -> None:
        (tmp_path / "link").symlink_to("nowhere")
        before = vm.config(), sorted(vm.info()["device_tree"])
        disk = raw(tmp_path, "refused") | options
        disk["path"] = disk["path"].format(folder=tmp_path)
        assert vm.vmm.put("vm.add-disk", disk, expect=status)[-1].startswith(words)
        assert (vm.config(), sorted(vm.info()["device_tree"])) == before


class TestSizes:
    @pytest.mark.parametrize("kind", ["Raw", "Qcow2"])
    def test_resized_disk_is_seen_by_the_guest(self, vm: Booted, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "resized"
        create(path, "raw" if kind == "Raw" else "qcow2", 4 * MIB)
        name = add(vm, {"id": "resized", "path": str(path), "image_type": kind, "serial": "resized"})
        resize(vm, 8 * MIB)
        wait_size(vm, name, 8 * MIB)
        vm.run(f"echo end | dd of=/dev/{name} bs=1M seek=7 conv=sync,fsync 2>/dev/null")
        assert vm.run(f"dd if=/dev/{name} iflag=direct bs=1M skip=7 2>/dev/null | head -c 3") == "end"
        vm.vmm.put("vm.pause")
        resize(vm, 16 * MIB)
        vm.vmm.put("vm.resume")
        wait_size(vm, name, 16 * MIB)
        remove(vm, "resized")
        assert image_bytes(path, kind.lower()) == 16 * MIB

    def test_limited_disk_is_resized(self, vm: Booted, tmp_path: Path) -> None:
        name = add(vm, raw(tmp_path, "resized", 4 * MIB, **limited(ops=bucket(1000))))
        resize(vm, 8 * MIB)
        wait_size(vm, name, 8 * MIB)
        remove(vm, "resized")

    def test_raw_disk_shrinks_and_a_qcow2_does_not(self, vm: Booted, tmp_path: Path) -> None:
        name = add(vm, raw(tmp_path, "resized", 4 * MIB))
        resize(vm, 2 * MIB)
        wait_size(vm, name, 2 * MIB)
        remove(vm, "resized")
        create(tmp_path / "qcow2", "qcow2", 4 * MIB)
        add(vm, {"id": "resized", "path": str(tmp_path / "qcow2"), "image_type": "Qcow2"})
        answer = vm.vmm.put("vm.resize-disk", {"id": "resized", "desired_size": 2 * MIB}, expect=500)
        assert answer[-1].endswith("cannot be resized: a qcow2 image does not shrink")
        remove(vm, "resized")

    @pytest.mark.parametrize(("kind", "image_format"), [("FixedVhd", "vpc"), ("Vhdx", "vhdx")])
    def test_types_without_sizes_are_refused(
        self, vm: Booted, tmp_path: Path, kind: str, image_format: str
    ) -> None:
        create(tmp_path / "image", image_format, 4 * MIB)
        name = add(vm, {"id": "resized", "path": str(tmp_path / "image"), "image_type": kind})
        before = vm.run(f"cat /sys/block/{name}/size")
        answer = vm.vmm.put("vm.resize-disk", {"id": "resized", "desired_size": 8 * MIB}, expect=500)
        assert answer[-1].endswith(f"cannot be resized: its type {kind} has no new sizes")
        assert vm.run(f"cat /sys/block/{name}/size") == before
        remove(vm, "resized")


def create(path: Path, image_format: str, size_bytes: int) -> None:
    options = ["-o", "subformat=fixed,force_size=on"] if image_format == "vpc" else []
    command = ["qemu-img", "create", "-q", "-f", image_format, *options, str(path), str(size_bytes)]
    subprocess.run(command, check=True, timeout=GUEST_S)


def image_bytes(path: Path, image_format: str) -> int:
    command = ["qemu-img", "info", "--output=json", "-f", image_format, str(path)]
    output = subprocess.run(command, check=True, timeout=GUEST_S, capture_output=True).stdout
    return int(json.loads(output)["virtual-size"])


def resize(vm: Booted, size_bytes: int, disk_id: str = "resized") -> None:
    vm.vmm.put("vm.resize-disk", {"id": disk_id, "desired_size": size_bytes}, expect=204)


def wait_size(vm: Booted, name: str, size_bytes: int) -> None:
    vm.run(
        f"until grep -qx {size_bytes // 512} /sys/block/{name}/size; do usleep 20000; done", timeout_s=GUEST_S
    )


class TestQueueAffinity:
    def test_each_pinned_queue_has_a_thread_on_its_processors(self, vm: Booted, tmp_path: Path) -> None:
        affinity = [{"queue_index": 1, "host_cpus": [0]}]
        disk = raw(tmp_path, "pinned", num_queues=2, queue_affinity=affinity, **limited(ops=bucket(1000)))
        name = add(vm, disk)
        everywhere = os.sched_getaffinity(0)
        assert sorted(queue_threads(vm), key=len) == [{0}, {0}, everywhere]  # and that of the cold disk
        vm.run(move(name, count=20, block="4k"))
        resize(vm, 8 * MIB, "pinned")
        wait_size(vm, name, 8 * MIB)
        vm.vmm.put("vm.pause")
        vm.vmm.put("vm.resume")
        vm.run(move(name, count=20, block="4k", write=False))
        assert vm.vmm.get("vm.counters")["pinned"]["write_ops"] == 20
        remove(vm, "pinned")
        wait_until(lambda: queue_threads(vm) == [{0}], "the threads end", timeout_s=GUEST_S)

    def test_processors_that_the_host_has_not_leave_all_as_before(self, vm: Booted, tmp_path: Path) -> None:
        before = vm.config(), queue_threads(vm)
        disk = raw(tmp_path, "pinned", queue_affinity=[{"queue_index": 0, "host_cpus": [4000]}])
        answer = vm.vmm.put("vm.add-disk", disk, expect=500)
        assert answer[-2] == "Queue 0 of the disk pinned cannot run on the host's processors [4000]"
        assert (vm.config(), queue_threads(vm)) == before
        vm.vmm.put("vm.add-disk", disk | {"queue_affinity": None}, expect=200)
        remove(vm, "pinned")


def queue_threads(vm: Booted) -> list[set[int]]:
    """Return the processors of each thread of QEMU that serves queues alone."""
    tasks = Path(f"/proc/{vm.qemu_pid()}/task").iterdir()
    named = ((task, (task / "comm").read_text()) for task in tasks)
    return [os.sched_getaffinity(int(task.name)) for task, name in named if name.startswith("IO io")]


class TestVmdk:
    def test_extents_are_the_guests_disk(self, vm: Booted, tmp_path: Path) -> None:
        (tmp_path / "one").write_bytes(b"1" * MIB)
        (tmp_path / "two").write_bytes(b"2" * (2 * MIB))
        text = (
            "# Disk DescriptorFile\nversion=1\ncreateType=twoGbMaxExtentFlat\n# Extent description\n"
            'RW 2048 FLAT "one"\nRW 2048 FLAT "two" 2048\n# The Disk Data Base\n'
        )
        path = tmp_path / "disk.vmdk"
        path.write_text(text)
        name = add(vm, {"id": "vmdk", "path": str(path), "image_type": "FlatVmdk"})
        assert vm.run(f"cat /sys/block/{name}/size") == "4096"
        assert vm.run(f"dd if=/dev/{name} bs=1k skip=1023 count=2 2>/dev/null | tr -s 12") == "12"
        vm.run(f"echo written | dd of=/dev/{name} bs=1M seek=1 conv=fsync 2>/dev/null")
        assert (tmp_path / "two").read_bytes()[MIB:].startswith(b"written\n2")
        assert not is_free(path, 0)
        remove(vm, "vmdk")
        assert is_free(path, 0)
        assert path.read_text() == text

    def test_type_that_was_not_given_is_refused(self, vm: Booted, tmp_path: Path) -> None:
        path = tmp_path / "disk.vmdk"
        command = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            "subformat=monolithicFlat",
            str(path),
            "1M",
        ]
        subprocess.run(command, check=True, timeout=GUEST_S)
        answer = vm.vmm.put("vm.add-disk", {"path": str(path)}, expect=500)
        assert answer[-1].endswith("it names other files, and its type was not given as vmdk")


def served(daemon: StorageDaemon, **options: Any) -> dict[str, Any]:
    return {"id": "served", "vhost_user": True, "vhost_socket": daemon.path, **options}


def driver_events(vm: Booted, device_id: str) -> list[str]:
    return [
        event["event"]
        for event in vm.events.documents()
        if event["source"] == "virtio-device" and event["properties"]["id"] == device_id
    ]


ABSENT_CHAIN = [
    "Error from API",
    "The disk could not be added to the VM",
    "Error from device manager",
    "Cannot create vhost-user-blk device",
    "Connection to socket failed",
]
REASONS = {
    "nothing": "No such file or directory",
    "file": "Connection refused",
    "folder": "Connection refused",
    "dead": "Connection refused",
    "datagrams": "Protocol wrong type for socket",
}


@contextlib.contextmanager
def hanging_up(path: Path) -> Iterator[Path]:
    """Have a socket at `path` that ends each connection at once."""
    with socket.create_server(str(path), family=socket.AF_UNIX) as listener:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(GUEST_S)


def leave(path: Path, what: str) -> socket.socket:
    """Make `path` what no back end is; return a socket to be closed."""
    kind = socket.SOCK_DGRAM if what == "datagrams" else socket.SOCK_STREAM
    made = socket.socket(socket.AF_UNIX, kind)
    if what == "file":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what in ("dead", "datagrams"):
        made.bind(str(path))
    if what == "dead":
        made.close()
    return made


class TestLocks:
    """Two VMs and one image. The second is refused at its boot, and when it adds the disk; see lifecycle."""

    @pytest.fixture
    def other(self, vm: Booted, tmp_path: Path) -> Iterator[Booted]:
        """A second VM that runs, whose guest nobody waits for."""
        with booting(tmp_path / "other", vm_config(), shell=None) as other:
            yield other

    @pytest.mark.parametrize("granularity", ["ByteRange", "Full"])
    def test_second_writer_is_refused_until_the_first_has_let_go(
        self, vm: Booted, tmp_path: Path, granularity: str
    ) -> None:
        disk = raw(tmp_path, "shared0", 4 * MIB, lock_granularity=granularity)
        name = add(vm, disk)
        vm.run(f"echo mine | dd of=/dev/{name} bs=512 conv=sync,fsync 2>/dev/null")
        before = Path(disk["path"]).read_bytes()
        with serving(tmp_path / "other") as other:
            other.vmm.put("vm.create", vm_config(disks=[disk]))
            answer = other.vmm.put("vm.boot", expect=500)
            assert LOCKED in answer
            assert Path(disk["path"]).read_bytes() == before
            vm.vmm.put("vm.remove-device", {"id": "shared0"}, expect=204)
            other.vmm.put("vm.delete")
            other.vmm.put("vm.create", vm_config(disks=[disk]))
            other.vmm.put("vm.boot")
            other.vmm.put("vm.shutdown")
        wait_until(
            lambda: "shared0" not in vm.info()["device_tree"], "the disk is removed", timeout_s=GUEST_S
        )

    def test_readers_share_an_image_and_no_writer_joins_them(
        self, vm: Booted, other: Booted, tmp_path: Path
    ) -> None:
        disk = raw(tmp_path, "shared0", 4 * MIB)
        for each in (vm, other):
            each.vmm.put("vm.add-disk", disk | {"readonly": True}, expect=200)
        with serving(tmp_path / "third") as third:
            third.vmm.put("vm.create", vm_config(disks=[disk]))
            assert LOCKED in third.vmm.put("vm.boot", expect=500)
        remove(vm, "shared0")

    def test_hot_disk_of_another_vm_is_refused(self, vm: Booted, other: Booted, tmp_path: Path) -> None:
        disk = raw(tmp_path, "shared0", 4 * MIB)
        add(vm, disk)
        before = other.config()
        answer = other.vmm.put("vm.add-disk", disk, expect=500)
        assert "is locked by another user" in answer[-2]
        assert other.config() == before
        remove(vm, "shared0")
        other.vmm.put("vm.add-disk", disk, expect=200)

    def test_lock_follows_the_size_and_no_disk_grows_into_anothers_range(
        self, vm: Booted, tmp_path: Path
    ) -> None:
        disk = raw(tmp_path, "resized", 4 * MIB)
        path = Path(disk["path"])
        name = add(vm, disk)
        resize(vm, 8 * MIB)
        assert [is_free(path, at * MIB) for at in (0, 7, 8)] == [False, False, True]
        resize(vm, 2 * MIB)
        assert [is_free(path, at * MIB) for at in (1, 2)] == [False, True]
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 3 * MIB)
            vm.vmm.put("vm.resize-disk", {"id": "resized", "desired_size": 4 * MIB}, expect=500)
        assert path.stat().st_size == 2 * MIB
        wait_size(vm, name, 2 * MIB)
        remove(vm, "resized")


LOCKED = "Cannot lock images of all block devices"


def is_free(path: Path, at: int) -> bool:
    """Say whether nobody else has a lock on the byte `at`."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except BlockingIOError:
            return False
    return True


class TestDiscards:
    @pytest.mark.parametrize("sparse", [True, False])
    def test_discarded_blocks_leave_the_image_of_a_sparse_disk(
        self, vm: Booted, tmp_path: Path, sparse: bool
    ) -> None:
        path = tmp_path / "discarded.raw"
        path.write_bytes(b"x" * (4 * MIB))
        disk = {"id": "discarded", "path": str(path), "image_type": "Raw", "sparse": sparse}
        name = add(vm, disk)
        before = path.stat().st_blocks
        assert vm.run(f"cat /sys/block/{name}/queue/write_zeroes_max_bytes") != "0"
        status, _ = vm.shell.run(f"blkdiscard /dev/{name}", timeout_s=GUEST_S)
        assert (status == 0) == sparse
        assert (path.stat().st_blocks < before / 8) == sparse
        remove(vm, "discarded")

    def test_disk_that_is_not_sparse_has_its_space_from_the_start(self, vm: Booted, tmp_path: Path) -> None:
        disk = raw(tmp_path, "whole", 4 * MIB)
        path = Path(disk["path"])
        add(vm, disk)
        remove(vm, "whole")
        assert path.stat().st_blocks * 512 < MIB
        add(vm, disk | {"sparse": False})
        assert path.stat().st_blocks * 512 >= 4 * MIB
        remove(vm, "whole")


class TestCounters:
    @pytest.mark.parametrize("options", [{}, limited(ops=bucket(1000))], ids=["free", "limited"])
    def test_counters_are_what_the_guest_did(
        self, vm: Booted, tmp_path: Path, options: dict[str, Any]
    ) -> None:
        name = add(vm, raw(tmp_path, "counted", 8 * MIB, **options))
        vm.run(
            f"dd if=/dev/{name} of=/dev/null bs=4k count=1 2>/dev/null"
        )  # udev and such have had their look
        before = counters(vm)
        vm.run(move(name, count=100, block="4k"))
        vm.run(move(name, count=30, block="64k", write=False))
        after = counters(vm)
        done = {key: after[key] - before[key] for key in after if "latency" not in key}
        assert done == {
            "write_ops": 100,
            "write_bytes": 100 * 4096,
            "read_ops": 30,
            "read_bytes": 30 * 65536,
        }
        for way in ("read", "write"):
            low, average, high = (after[f"{way}_latency_{word}"] for word in ("min", "avg", "max"))
            assert 0 < low <= average <= high < GUEST_S * 1_000_000
        remove(vm, "counted")


def counters(vm: Booted) -> dict[str, int]:
    return vm.vmm.get("vm.counters")["counted"]


class TestVhostUser:
    @pytest.fixture
    def daemon(self, tmp_path: Path) -> Iterator[StorageDaemon]:
        image = make_image(tmp_path / "served.raw", 8 * MIB)
        with StorageDaemon(str(tmp_path / "served.sock"), image, queues=2) as daemon:
            yield daemon

    def test_queues_are_the_guests_and_its_driver_is_told_of_at_reset_alone(
        self, vm: Booted, daemon: StorageDaemon
    ) -> None:
        name = add(vm, served(daemon, num_queues=2))
        assert vm.run(f"ls /sys/block/{name}/mq").split() == ["0", "1"]
        remove(vm, "served")
        wait_until(lambda: driver_events(vm, "served") == ["reset"], "the driver's reset", timeout_s=GUEST_S)

    def test_back_end_that_comes_back_goes_on_with_what_was_under_way(
        self, vm: Booted, daemon: StorageDaemon, tmp_path: Path
    ) -> None:
        name = add(vm, served(daemon))
        vm.run(f"echo before | dd of=/dev/{name} bs=512 conv=sync,fsync 2>/dev/null")
        daemon.kill()
        vm.run(f"(echo after | dd of=/dev/{name} bs=512 seek=8 conv=sync,fsync; echo $? > /tmp/done) 2>&1 &")
        assert vm.run("test ! -e /tmp/done && echo waits") == "waits"
        daemon.start()
        assert (
            vm.run("until test -s /tmp/done; do usleep 20000; done; cat /tmp/done", timeout_s=GUEST_S) == "0"
        )
        written = (tmp_path / "served.raw").read_bytes()
        assert (written[:6], written[4096:4102]) == (b"before", b"after\n")
        remove(vm, "served")

    def test_back_end_that_comes_back_silent_does_not_stop_the_guest(
        self, vm: Booted, daemon: StorageDaemon
    ) -> None:
        name = add(vm, served(daemon))
        daemon.kill()
        os.unlink(daemon.path)
        with socket.create_server(daemon.path, family=socket.AF_UNIX) as silent:
            silent.settimeout(GUEST_S)
            connection, _ = silent.accept()
            with connection:
                assert vm.run("echo lives", timeout_s=GUEST_S) == "lives"
        os.unlink(daemon.path)
        daemon.start()
        vm.run(f"dd if=/dev/{name} of=/dev/null bs=512 count=1 2>/dev/null")
        remove(vm, "served")

    def test_back_end_that_says_nothing_is_given_up_while_the_guest_goes_on(
        self, vm: Booted, tmp_path: Path
    ) -> None:
        before = vm.config(), sorted(vm.info()["device_tree"])
        path = str(tmp_path / "socket")
        answers: list[list[str]] = []
        with socket.create_server(path, family=socket.AF_UNIX) as silent, vm.vmm.second() as other:
            silent.settimeout(GUEST_S)
            disk = {"vhost_user": True, "vhost_socket": path}
            adding = threading.Thread(
                target=lambda: answers.append(other.put("vm.add-disk", disk, expect=500))
            )
            adding.start()
            connection, _ = silent.accept()
            with connection:
                assert vm.run("echo lives") == "lives"
                adding.join()
        assert answers[0][-2:] == ["Get features failed", "The back end did not answer within 5 s"]
        assert (vm.config(), sorted(vm.info()["device_tree"])) == before

    def test_boot_says_that_there_is_no_back_end_and_succeeds_when_there_is(self, tmp_path: Path) -> None:
        image = make_image(tmp_path / "served.raw", 8 * MIB)
        path = str(tmp_path / "served.sock")
        disk = {"id": "served", "vhost_user": True, "vhost_socket": path}
        with serving(tmp_path / "run") as vm:
            vm.vmm.put("vm.create", vm_config(memory={"size": 256 * MIB, "shared": True}, disks=[disk]))
            before = vm.info()
            answer = vm.vmm.put("vm.boot", expect=500)
            assert answer[-3:-1] == ABSENT_CHAIN[-2:]
            assert vm.info() == before
            with StorageDaemon(path, image):
                vm.vmm.put("vm.boot")
                vm.vmm.put("vm.shutdown")

    def test_back_end_that_hangs_up_leaves_all_as_before(self, vm: Booted, tmp_path: Path) -> None:
        before = vm.config(), sorted(vm.info()["device_tree"])
        with hanging_up(tmp_path / "socket") as path:
            disk = {"vhost_user": True, "vhost_socket": str(path)}
            answer = vm.vmm.put("vm.add-disk", disk, expect=500)
        assert answer[-1] == "The back end closed the connection"
        assert (vm.config(), sorted(vm.info()["device_tree"])) == before
        assert vm.run("echo lives") == "lives"

    @pytest.mark.parametrize("what", ["nothing", "file", "folder", "dead", "datagrams"])
    def test_back_end_that_is_not_there_leaves_all_as_before(
        self, vm: Booted, tmp_path: Path, what: str
    ) -> None:
        path = tmp_path / "socket"
        with contextlib.closing(leave(path, what)):
            before = vm.config(), sorted(vm.info()["device_tree"])
            disk = {"vhost_user": True, "vhost_socket": str(path)}
            answer = vm.vmm.put("vm.add-disk", disk, expect=500)
        assert answer[:-1] == ABSENT_CHAIN
        assert answer[-1].startswith(REASONS[what])
        assert (vm.config(), sorted(vm.info()["device_tree"])) == before
