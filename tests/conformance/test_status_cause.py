"""Every cause of every status code, on every engine, over HTTP: rest.md section 3, row by row.

A row is (status, why, state, method, command, body, texts): the states are those of `support.bench`, `texts`
are the whole body of an error. What belongs to a state is in `test_state_matrix.py`, what belongs to the
grammar of HTTP alone in `test_misuse.py` and `test_framing.py`.
"""

from __future__ import annotations

import msgspec
import pytest

from support.bench import texts
from support.leak import Holdings
from support.rest import request_bytes
from support.vm import MIB

API = "Error from API"
BOOT = "The VM could not boot"
ADD_DISK = "The disk could not be added to the VM"
ADD_NET = "The network device could not be added to the VM"
ADD_DEVICE = "The device could not be added to the VM"
RULES = "Failed to validate config"
MEMORY = "Memory manager error"
DEVICES = "Error from device manager"
BAD_REQUEST = ["Bad Request"]
VFIO = {"path": "/sys/bus/pci/devices/0000:01:00.0"}

ROWS = [
    (200, "an action with a body", "N", "GET", "vmm.ping", None, None),
    (204, "deletion of nothing", "N", "PUT", "vm.delete", None, None),
    (204, "cold add", "C", "PUT", "vm.add-disk", {"path": "/d"}, None),
    (400, "wrong method", "N", "GET", "vm.boot", None, BAD_REQUEST),
    (400, "body missing", "N", "PUT", "vm.resize", None, BAD_REQUEST),
    (400, "body forbidden", "C", "PUT", "vm.boot", {}, BAD_REQUEST),
    (
        400,
        "JSON that does not deserialize",
        "C",
        "PUT",
        "vm.remove-device",
        {},
        ["Failed to deserialize JSON", "missing field `id` at line 1 column 2"],
    ),
    (
        400,
        "a rule of the config",
        "C",
        "PUT",
        "vm.add-disk",
        {"path": "/d", "id": "__d"},
        [API, ADD_DISK, RULES, "Identifier __d is not valid"],
    ),
    (
        400,
        "a rule of the config, booted",
        "R",
        "PUT",
        "vm.add-disk",
        {"path": "/d", "num_queues": 2},
        [API, ADD_DISK, RULES, "Queue count (2) must not exceed boot vCPUs (1)"],
    ),
    (404, "unknown path", "N", "PUT", "vm.fly", None, ["Not Found"]),
    (
        404,
        "no VM",
        "N",
        "GET",
        "vm.info",
        None,
        [API, "The VM info is not available", "VM is not created"],
    ),
    (404, "no config", "N", "PUT", "vm.boot", None, [API, BOOT, "VM config is missing"]),
    (
        404,
        "no such device in the config",
        "C",
        "PUT",
        "vm.remove-device",
        {"id": "x"},
        [API, "The device could not be removed from the VM", 'No device with id "x" to remove'],
    ),
    (
        404,
        "no such device in the VM",
        "R",
        "PUT",
        "vm.remove-device",
        {"id": "x"},
        [
            API,
            "The device could not be removed from the VM",
            DEVICES,
            "Failed to find device corresponding to the given identifier: x",
        ],
    ),
    (
        409,
        "an id in use",
        "R",
        "PUT",
        "vm.add-disk",
        {"path": "/d", "id": "d0"},
        [API, ADD_DISK, RULES, "Identifier d0 is not unique"],
    ),
    (
        500,
        "a VM there is",
        "C",
        "PUT",
        "vm.create",
        {},
        [API, "The VM could not be created", "VM is already created"],
    ),
    (
        500,
        "no VM object",
        "C",
        "PUT",
        "vm.pause",
        None,
        [API, "The VM could not be paused", "VM is not running"],
    ),
    (
        500,
        "a transition that is not",
        "R",
        "PUT",
        "vm.resume",
        None,
        [
            API,
            "The VM could not resume",
            "Cannot resume VM",
            "Failed to resume migratable component",
            "Invalid transition: InvalidStateTransition(Running, Running)",
        ],
    ),
    (
        500,
        "a disk that is not there",
        "R",
        "PUT",
        "vm.add-disk",
        {},
        [API, ADD_DISK, DEVICES, "No disk path was specified when one was expected"],
    ),
    (
        500,
        "the type of a device",
        "R",
        "PUT",
        "vm.remove-device",
        {"id": "__rng"},
        [
            API,
            "The device could not be removed from the VM",
            DEVICES,
            "Not allowed to remove this type of device from the VM: rng",
        ],
    ),
    (
        500,
        "a device behind the vIOMMU",
        "R",
        "PUT",
        "vm.add-disk",
        {"path": "/d", "iommu": True},
        [API, ADD_DISK, DEVICES, "Cannot hotplug device behind vIOMMU"],
    ),
    (
        500,
        "no vCPU",
        "R",
        "PUT",
        "vm.resize",
        {"desired_vcpus": 0},
        [API, "The VM could not be resized", "Error from CPU manager", "Requested zero vCPUs"],
    ),
    (
        500,
        "too many vCPUs",
        "R",
        "PUT",
        "vm.resize",
        {"desired_vcpus": 3},
        [API, "The VM could not be resized", "Error from CPU manager", "Requested vCPUs exceed maximum"],
    ),
    (
        500,
        "RAM in zones",
        "R",
        "PUT",
        "vm.resize",
        {"desired_ram": MIB},
        [
            API,
            "The VM could not be resized",
            MEMORY,
            "Impossible to resize guest memory if it is backed by user defined memory regions",
        ],
    ),
    (
        500,
        "no balloon",
        "R",
        "PUT",
        "vm.resize",
        {"desired_balloon": 0},
        [
            API,
            "The VM could not be resized",
            DEVICES,
            "Missing virtio-balloon, can't proceed as expected",
        ],
    ),
    (
        500,
        "less than boot RAM",
        "R",
        "PUT",
        "vm.resize-zone",
        {"id": "z", "desired_ram": MIB},
        [
            API,
            "The memory zone could not be resized",
            MEMORY,
            "Invalid resize request: desired_size = 1048576 below boot size = 268435456",
        ],
    ),
]


@pytest.mark.parametrize(
    ("status", "state", "method", "command", "body", "expected"),
    [pytest.param(row[0], *row[2:], id=f"{row[0]}-{row[1]}".replace(" ", "-")) for row in ROWS],
)
def test_cause(bench, status, state, method, command, body, expected):
    bench.reach(state)

    reply = bench.exchange(method, command, body)

    assert (reply.status, texts(reply) or None) == (status, expected)


@pytest.mark.parametrize("fds", [2, 3])
def test_wrong_number_of_descriptors_is_400(bench, fds, tmp_path):
    bench.reach("C")
    before = Holdings()
    with (tmp_path / "file").open("w") as file:
        reply = bench.vmm.exchange("PUT", "vm.add-device", {}, fds=[file.fileno()] * fds)
    assert (reply.status, texts(reply)) == (400, BAD_REQUEST)
    before.assert_nothing_added()


def test_descriptors_that_fit_no_queues_are_400_and_are_closed(bench, tmp_path):
    bench.reach("R")
    with (tmp_path / "file").open("w") as file:
        reply = bench.vmm.exchange("PUT", "vm.add-net", {"num_queues": 4}, fds=[file.fileno()])
    assert (reply.status, texts(reply)) == (
        400,
        [
            API,
            ADD_NET,
            RULES,
            "Number of queues (4) to virtio_net does not match the number of FDs (2)",
        ],
    )
    held = [fd.readlink() for fd in bench.server_descriptors()]
    assert tmp_path / "file" not in held


def test_duplicate_vfio_device_is_409(bench):
    bench.create(devices=[VFIO])

    assert bench.vmm.put("vm.add-device", VFIO, expect=409) == [
        API,
        ADD_DEVICE,
        RULES,
        f"Duplicated device path: {VFIO['path']}",
    ]


def test_resize_while_a_removal_is_pending_is_429(bench):
    if bench.engine.name == "qemu":
        pytest.skip("Needs a guest that has booted: tests/integration/test_resize.py")
    bench.create(cpus={"boot_vcpus": 2, "max_vcpus": 2})
    bench.vmm.put("vm.boot")
    bench.vmm.put("vm.pause")  # a guest that stands still lets go of nothing
    bench.vmm.put("vm.resize", {"desired_vcpus": 1})

    assert bench.vmm.put("vm.resize", {"desired_vcpus": 1}, expect=429) == ["Too Many Requests"]


def test_unparsable_http_is_400(bench):
    with bench.vmm.connect() as client:
        client.send(b"POST /api/v1/vmm.ping HTTP/1.1\r\n\r\n")
        assert client.reply().status == 400


def test_body_over_the_limit_is_400(bench):
    with bench.vmm.connect() as client:
        client.send(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4194305\r\n\r\n")
        assert client.reply().status == 400


def test_expectation_is_answered_100_first(bench):
    with bench.vmm.connect() as client:
        client.send(
            b"PUT /api/v1/vm.remove-device HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert client.reply().status == 100
        client.send(b"{}")
        assert client.reply().status == 400


def test_eleventh_connection_is_503(bench):
    bench.vmm.close()
    clients = [bench.vmm.connect() for _ in range(10)]
    try:
        for client in clients:
            assert client.ping().status == 200
        with bench.vmm.connect() as eleventh:
            assert eleventh.reply().status == 503
    finally:
        for client in clients:
            client.close()


@pytest.mark.parametrize("command", ["vm.boot", "vm.info", "vm.fly"])
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "POST", "HEAD"])
def test_405_413_and_501_are_never_sent(bench, method, command):
    bench.reach("N")
    with bench.vmm.connect() as client:
        client.send(request_bytes(method, f"/api/v1/{command}"))
        assert client.reply().status in (200, 204, 400, 404, 500)


def test_success_bodies_are_json_or_empty(bench):
    bench.reach("R")
    for command in ("vmm.ping", "vm.info", "vm.counters"):
        assert isinstance(msgspec.json.decode(bench.exchange("GET", command, None).body), dict)
    assert bench.exchange("PUT", "vm.power-button", None).body == b""
