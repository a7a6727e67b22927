"""Every call in every state, on every engine, over HTTP: rest.md section 8, cell by cell.

A row is (call, states, status, chain): the answer to the call in each of the states, with the error chain
after "Error from API". The states are those of `support.bench`; `M`, an outgoing migration, is in
`test_migration_matrix.py`. A cell that an engine cannot carry out yet has a second row in its table of
`CANNOT_YET`, with the honest error.
"""

from __future__ import annotations

import shutil

import msgspec
import pytest

from cloudvmm.api import COMMANDS
from cloudvmm.engine.qemu import QemuEngine
from support.bench import CALLS, Bench, texts

STATES = "NCRP"

INFO = "The VM info is not available"
CREATE = "The VM could not be created"
BOOT = "The VM could not boot"
SHUTDOWN = "The VM could not shutdown"
REBOOT = "The VM could not reboot"
PAUSE = "The VM could not be paused"
RESUME = "The VM could not resume"
SNAPSHOT = "The VM could not be snapshotted"
RESTORE = "The VM could not be restored"
COREDUMP = "The VM could not be coredumped"
POWER_BUTTON = "Error triggering power button"
NMI = "Error triggering NMI"
RESIZE = "The VM could not be resized"
RESIZE_ZONE = "The memory zone could not be resized"
RESIZE_DISK = "The disk could not be resized"
REMOVE = "The device could not be removed from the VM"
SEND = "Error dispatching the migration worker"
RECEIVE = "Error receiving migration"

ADD = {
    "vm.add-device": "The device could not be added to the VM",
    "vm.add-user-device": "The user device could not be added to the VM",
    "vm.add-disk": "The disk could not be added to the VM",
    "vm.add-fs": "The fs could not be added to the VM",
    "vm.add-generic-vhost-user": "The generic vhost-user device could not be added to the VM",
    "vm.add-net": "The network device could not be added to the VM",
    "vm.add-pmem": "The pmem device could not be added to the VM",
    "vm.add-vdpa": "The vDPA device could not be added to the VM",
    "vm.add-vsock": "The vsock device could not be added to the VM",
}

NOT_CREATED = "VM is not created"
NOT_RUNNING = "VM is not running"
ALREADY_CREATED = "VM is already created"
CPU_MANAGER = "Error from CPU manager"
MEMORY_MANAGER = "Memory manager error"
DEVICE_MANAGER = "Error from device manager"
UNKNOWN_ID = "Failed to find device corresponding to the given identifier: x"
NOT_SENT = "Failed to send migratable component snapshot"
NOT_RECEIVED = "Failed to receive migratable component snapshot"

TABLE = [
    ("vmm.ping", "NCRP", 200),
    ("vm.info", "N", 404, INFO, NOT_CREATED),
    ("vm.info", "CRP", 200),
    ("vm.counters", "NC", 500, INFO, NOT_RUNNING),
    ("vm.counters", "RP", 200),
    ("vm.create", "N", 204),
    ("vm.create", "CRP", 500, CREATE, ALREADY_CREATED),
    ("vm.boot", "N", 404, BOOT, "VM config is missing"),
    ("vm.boot", "C", 204),
    ("vm.boot", "RPF", 500, BOOT, ALREADY_CREATED),
    ("vm.delete", "NCRPF", 204),
    ("vm.shutdown", "NC", 500, SHUTDOWN, NOT_RUNNING),
    ("vm.shutdown", "RPF", 204),
    ("vm.reboot", "NC", 404, REBOOT, NOT_CREATED),
    ("vm.reboot", "RP", 204),
    ("vm.pause", "NC", 500, PAUSE, NOT_RUNNING),
    ("vm.pause", "R", 204),
    (
        "vm.pause",
        "P",
        500,
        PAUSE,
        "Cannot pause VM",
        "Failed to pause migratable component",
        "Invalid transition: InvalidStateTransition(Paused, Paused)",
    ),
    ("vm.resume", "NC", 500, RESUME, NOT_RUNNING),
    (
        "vm.resume",
        "R",
        500,
        RESUME,
        "Cannot resume VM",
        "Failed to resume migratable component",
        "Invalid transition: InvalidStateTransition(Running, Running)",
    ),
    ("vm.resume", "P", 204),
    ("vm.power-button", "NC", 500, POWER_BUTTON, NOT_RUNNING),
    ("vm.power-button", "RP", 204),
    ("vm.nmi", "NC", 500, NMI, NOT_RUNNING),
    ("vm.nmi", "RP", 204),
    ("vm.coredump", "NC", 500, COREDUMP, NOT_RUNNING),
    ("vm.coredump", "RP", 204),
    ("vm.resize", "N", 404, RESIZE, NOT_CREATED),
    ("vm.resize", "CRP", 204),
    ("vm.resize-zone", "N", 404, RESIZE_ZONE, NOT_CREATED),
    ("vm.resize-zone", "CRP", 204),
    ("vm.resize-zone unknown", "CRP", 500, RESIZE_ZONE, "Failed resizing a memory zone"),
    ("vm.resize-disk", "N", 404, RESIZE_DISK, NOT_CREATED),
    ("vm.resize-disk", "C", 500, RESIZE_DISK, "Failed resizing a disk image"),
    ("vm.resize-disk", "RP", 204),
    ("vm.resize-disk unknown", "RP", 404, RESIZE_DISK, DEVICE_MANAGER, UNKNOWN_ID),
    *((call, "N", 404, error, NOT_CREATED) for call, error in ADD.items()),
    *((call, "C", 204) for call in ADD),
    *((call, "RP", 200) for call in ADD),
    (
        "vm.add-disk used id",
        "CRP",
        409,
        ADD["vm.add-disk"],
        "Failed to validate config",
        "Identifier d0 is not unique",
    ),
    ("vm.remove-device", "N", 404, REMOVE, NOT_CREATED),
    ("vm.remove-device", "CRP", 204),
    ("vm.remove-device unknown", "C", 404, REMOVE, 'No device with id "x" to remove'),
    ("vm.remove-device unknown", "RP", 404, REMOVE, DEVICE_MANAGER, UNKNOWN_ID),
    ("vm.snapshot", "NC", 500, SNAPSHOT, NOT_RUNNING),
    (
        "vm.snapshot",
        "R",
        500,
        SNAPSHOT,
        "Cannot snapshot VM",
        "Failed to snapshot migratable component",
        "Trying to snapshot while VM is running",
    ),
    ("vm.snapshot", "P", 204),
    ("vm.fork", "NC", 500, "The VM could not be forked", NOT_RUNNING),
    ("vm.fork", "RP", 200),
    ("vm.restore", "N", 204),
    ("vm.restore", "CRP", 500, RESTORE, ALREADY_CREATED),
    # At an address that is none, since who may receive waits; that it receives is tested in test_transfer.py.
    (
        "vm.receive-migration",
        "NC",
        500,
        RECEIVE,
        NOT_RECEIVED,
        "Invalid receive migration configuration",
        "Expected receiver_url to either use `tcp` or `unix` prefix",
    ),
    # At a good one where no socket can be made, so that whoever listens says so at once.
    (
        "vm.receive-migration unix",
        "NC",
        500,
        RECEIVE,
        NOT_RECEIVED,
        "Error binding to UNIX socket",
        "No such file or directory (os error 2)",
    ),
    (
        "vm.receive-migration",
        "RP",
        500,
        RECEIVE,
        NOT_RECEIVED,
        "Can't receive a migration when a VM is already created",
    ),
    ("vm.send-migration", "NC", 500, SEND, NOT_SENT, NOT_RUNNING),
    ("vm.send-migration", "RP", 204),
    ("vm.cancel-migration", "NCRP", 500, "Error cancelling the migration", "There is no migration"),
    ("vm.cancel-snapshot", "NCRP", 500, "Error cancelling the snapshot", "No snapshot is being taken"),
    ("vmm.jobs", "NCRP", 200),
    ("vmm.cancel-job", "NCRP", 404, "Error cancelling the job", "There is no job 999"),
    ("vmm.shutdown", "NCRP", 200),
]

UNCONNECTED = ("Connection to socket failed", "No such file or directory: /s (os error 2)")
NO_MEANS = {  # the bench names none that are there
    "vm.add-device": (
        "Cannot create a VFIO device",
        "There is no device /none",
        "No such file or directory: /none (os error 2)",
    ),
    "vm.add-vdpa": (
        "Cannot create vdpa device",
        "Failed to create vhost-vdpa",
        "No such file or directory: /dev/vhost-vdpa-none (os error 2)",
    ),
    "vm.add-fs": ("Cannot create virtio-fs device", *UNCONNECTED),
    "vm.add-generic-vhost-user": ("Cannot create generic vhost-user device", *UNCONNECTED),
}
NO_VFIO_USER = "vfio-user devices need a QEMU with the device vfio-user-pci, which comes with QEMU 11.0"

CANNOT_YET = {
    "fake": [],
    "qemu": [
        *((call, "RP", 500, ADD[call], DEVICE_MANAGER, *words) for call, words in NO_MEANS.items()),
        ("vm.add-user-device", "RP", 500, ADD["vm.add-user-device"], DEVICE_MANAGER, NO_VFIO_USER),
    ],
}


def cells(rows):
    """Return (call, state) to (status, chain) for every cell of `rows`."""
    return {(call, state): (status, chain) for call, states, status, *chain in rows for state in states}


# Where a call that succeeds leads; any other leaves the state as it is, and so does whatever is refused.
LEADS_TO = {
    "vm.create": "C",
    "vm.boot": "R",
    "vm.delete": "N",
    "vm.shutdown": "C",
    "vm.reboot": "R",
    "vm.pause": "P",
    "vm.resume": "R",
    "vm.restore": "P",
}

CELLS = cells(TABLE)
# Those of one state together, so that a VM that refuses serves many.
IN_ORDER = sorted(CELLS, key=lambda cell: "NCRPF".index(cell[1]))


@pytest.fixture
def own_bench(bench, tmp_path):
    """A server that the test may end."""
    own = Bench(bench.engine, tmp_path)
    yield own
    own.close()


def expected(bench, call, state):
    status, chain = cells(CANNOT_YET[bench.engine.name]).get((call, state), CELLS[call, state])
    if chain and chain[-1] == NO_VFIO_USER:
        program = shutil.which("qemu-system-x86_64")
        release = ".".join(map(str, QemuEngine(accel="tcg").facts().version))
        chain = [*chain[:-1], f"{NO_VFIO_USER}: {program} is QEMU {release} and lacks it"]
    return status, chain


def test_every_command_has_a_cell_for_every_state():
    """But for what tells of the last one: what that answers depends on what was, not on what there is."""
    of_the_past = {"vm.migration-progress", "vm.snapshot-progress"}
    missing = [
        (command.name, state)
        for command in COMMANDS
        for state in STATES
        if (command.name, state) not in CELLS and command.name not in of_the_past
    ]
    assert missing == []
    assert {call for call, _ in CELLS} == set(CALLS)


def test_no_cell_has_two_rows():
    for rows in (TABLE, *CANNOT_YET.values()):
        assert sum(len(states) for _, states, *_ in rows) == len(cells(rows))
        assert set(cells(rows)) <= set(CELLS)


@pytest.mark.parametrize(("call", "state"), [cell for cell in IN_ORDER if cell[0] != "vmm.shutdown"])
def test_cell(bench, call, state):
    status, chain = expected(bench, call, state)
    bench.reach(state)

    reply = bench.call(call)

    assert (reply.status, texts(reply)) == (status, ["Error from API", *chain] if chain else [])
    assert bench.has_state(state if status >= 400 else LEADS_TO.get(call, state))


@pytest.mark.parametrize("state", STATES)
def test_vmm_shutdown_ends_the_server_from_every_state(own_bench, state):
    own_bench.reach(state)

    reply = own_bench.call("vmm.shutdown")

    assert (reply.status, reply.body) == (200, b"")
    assert own_bench.server.wait_end() == 0


@pytest.mark.parametrize("state", "RP")
def test_hot_add_answers_with_id_and_address(bench, state):
    able = [call for call in ADD if expected(bench, call, state)[0] == 200]
    assert {"vm.add-disk", "vm.add-net"} <= set(able)
    bench.reach("N")
    bench.reach(state)
    for call in able:
        answer = msgspec.json.decode(bench.call(call).body)
        assert sorted(answer) == ["bdf", "id"]
        tree = bench.vmm.get("vm.info")["device_tree"]
        node = tree[answer["id"]]
        assert tree[node.get("parent", answer["id"])]["pci_bdf"] == answer["bdf"]
