"""The sub-commands: what each is called, what it takes, which command of the API it sends.

A plain table, cheap to import. A test compares it with the list of commands in `api/action.py`.
"""

from __future__ import annotations

from typing import NamedTuple


class Argument(NamedTuple):
    """`schema` names the flag of `cloudvmm`, or the operation, whose option string it takes."""

    name: str
    help: str
    schema: str | None = None
    default: str | None = None
    is_number: bool = False


class Option(NamedTuple):
    """`is_switch` has no value. `is_ours` is not known to the reference."""

    name: str
    help: str
    metavar: str = ""
    is_required: bool = False
    is_switch: bool = False
    is_ours: bool = False


class Subcommand(NamedTuple):
    """`api_command` is the command of the API; `doing` what a progress line says of one that takes long."""

    name: str
    about: str
    api_command: str
    method: str = "PUT"
    argument: Argument | None = None
    options: tuple[Option, ...] = ()
    doing: str | None = None
    is_ours: bool = False

    @property
    def dbus_method(self) -> str:
        """`vm.add-disk` is `VmAddDisk` there."""
        words = self.api_command.replace(".", "-").split("-")
        return "".join(word.capitalize() for word in words)


GLOBAL_OPTIONS = (
    Option("api-socket", "HTTP API socket path (UNIX domain socket).", "api-socket"),
    Option("dbus-object-path", "Object path which the interface is being served at", "dbus-object-path"),
    Option("dbus-service-name", "Well known name of the D-Bus service", "dbus-service-name"),
    Option("dbus-system-bus", "Use the system bus instead of a session bus", is_switch=True),
    Option("timeout", "Give up when there is no answer after so long (extension)", "seconds", is_ours=True),
)

_SIZE = "supports K/M/G suffix"
_WAIT_SIZE = Option("wait", "Wait so long for the guest to follow (extension)", "seconds", is_ours=True)


def _device(what: str) -> Argument:
    return Argument(f"{what}_config", "Device parameters", schema=what.replace("_", "-"))


SUBCOMMANDS = (
    Subcommand("add-device", "Add VFIO device", "vm.add-device", argument=_device("device")),
    Subcommand("add-disk", "Add block device", "vm.add-disk", argument=_device("disk")),
    Subcommand("add-fs", "Add virtio-fs backed fs device", "vm.add-fs", argument=_device("fs")),
    Subcommand(
        "add-generic-vhost-user",
        "Add generic vhost-user device",
        "vm.add-generic-vhost-user",
        argument=_device("generic_vhost_user"),
    ),
    Subcommand("add-net", "Add network device", "vm.add-net", argument=_device("net")),
    Subcommand("add-pmem", "Add persistent memory device", "vm.add-pmem", argument=_device("pmem")),
    Subcommand(
        "add-user-device",
        "Add userspace device",
        "vm.add-user-device",
        argument=Argument("device_config", "Device parameters", schema="user-device"),
    ),
    Subcommand("add-vdpa", "Add vDPA device", "vm.add-vdpa", argument=_device("vdpa")),
    Subcommand("add-vsock", "Add vsock device", "vm.add-vsock", argument=_device("vsock")),
    Subcommand("boot", "Boot a created VM", "vm.boot", doing="Booting the VM"),
    Subcommand(
        "cancel-job",
        "Call off a command that waits, a snapshot or a migration (extension)",
        "vmm.cancel-job",
        argument=Argument("id", "The number that jobs tells", is_number=True),
        is_ours=True,
    ),
    Subcommand(
        "cancel-migration", "Call off a VM migration (extension)", "vm.cancel-migration", is_ours=True
    ),
    Subcommand("cancel-snapshot", "Call off a snapshot (extension)", "vm.cancel-snapshot", is_ours=True),
    Subcommand(
        "coredump",
        "Create a coredump from VM",
        "vm.coredump",
        argument=Argument(
            "coredump_config", "Where to write it, a file that is not there yet: file://<path>"
        ),
        doing="Writing the coredump",
    ),
    Subcommand("counters", "Counters from the VM", "vm.counters", "GET"),
    Subcommand(
        "create",
        "Create VM from a JSON configuration",
        "vm.create",
        argument=Argument("path", "File with the configuration; - is standard input", default="-"),
    ),
    Subcommand("delete", "Delete a VM", "vm.delete"),
    Subcommand(
        "events",
        "Follow the events of the VMM, one JSON line each (extension)",
        "vm.events",
        "GET",
        options=(Option("from", "Begin with the event of this number, as far as it is kept", "number"),),
        is_ours=True,
    ),
    Subcommand(
        "fork",
        "Make clones of the VM, which goes on (extension)",
        "vm.fork",
        argument=Argument("directory", "An existing folder for new disk images and for the clones"),
        options=(
            Option("count", "How many clones", "number"),
            Option("clones", "File with what each has otherwise than the others, as JSON", "path"),
            Option("paused", "Leave the clones paused", is_switch=True),
        ),
        doing="Forking the VM",
        is_ours=True,
    ),
    Subcommand("info", "Info on the VM", "vm.info", "GET"),
    Subcommand(
        "jobs", "Which commands are under way and which wait (extension)", "vmm.jobs", "GET", is_ours=True
    ),
    Subcommand(
        "migration-progress",
        "How far a VM migration is (extension)",
        "vm.migration-progress",
        "GET",
        is_ours=True,
    ),
    Subcommand("nmi", "Trigger NMI", "vm.nmi"),
    Subcommand("pause", "Pause the VM", "vm.pause"),
    Subcommand("ping", "Ping the VMM to check for API server availability", "vmm.ping", "GET"),
    Subcommand("power-button", "Trigger a power button in the VM", "vm.power-button"),
    Subcommand("reboot", "Reboot the VM", "vm.reboot", doing="Rebooting the VM"),
    Subcommand(
        "receive-migration",
        "Receive a VM migration",
        "vm.receive-migration",
        argument=Argument(
            "receive_migration_config",
            "<receiver_url> (up to v52), or parameters",
            schema="receive-migration",
        ),
        doing="Receiving the VM",
    ),
    Subcommand(
        "remove-device",
        "Remove VFIO and PCI device",
        "vm.remove-device",
        argument=Argument("id", "Device identifier"),
        options=(
            Option("wait", "Wait so long for the guest to let go of it (extension)", "seconds", is_ours=True),
        ),
    ),
    Subcommand(
        "resize",
        "Resize the VM",
        "vm.resize",
        options=(
            Option("balloon", f"New balloon size in bytes ({_SIZE})", "balloon"),
            Option("cpus", "New vCPUs count", "cpus"),
            Option("memory", f"New memory size in bytes ({_SIZE})", "memory"),
            _WAIT_SIZE,
        ),
        doing="Resizing the VM",
    ),
    Subcommand(
        "resize-disk",
        "Resize an attached disk",
        "vm.resize-disk",
        options=(
            Option("disk", "Disk identifier", "disk", is_required=True),
            Option("size", f"New disk size in bytes ({_SIZE})", "size", is_required=True),
        ),
        doing="Resizing the disk",
    ),
    Subcommand(
        "resize-zone",
        "Resize a memory zone",
        "vm.resize-zone",
        options=(
            Option("id", "Memory zone identifier", "id", is_required=True),
            Option("size", f"New memory zone size in bytes ({_SIZE})", "size", is_required=True),
            _WAIT_SIZE,
        ),
        doing="Resizing the memory zone",
    ),
    Subcommand(
        "restore",
        "Restore VM from a snapshot",
        "vm.restore",
        argument=Argument("restore_config", "Restore parameters", schema="restore"),
        doing="Restoring the VM",
    ),
    Subcommand("resume", "Resume the VM", "vm.resume"),
    Subcommand(
        "send-migration",
        "Initiate a VM migration",
        "vm.send-migration",
        argument=Argument(
            "send_migration_config", "<destination_url> (up to v51), or parameters", schema="send-migration"
        ),
        options=(Option("local", "As local=on (up to v51)", is_switch=True),),
        doing="Sending the VM",
    ),
    Subcommand("shutdown", "Shutdown the VM", "vm.shutdown"),
    Subcommand("shutdown-vmm", "Shutdown the VMM", "vmm.shutdown"),
    Subcommand(
        "snapshot",
        "Create a snapshot from VM",
        "vm.snapshot",
        argument=Argument("snapshot_config", "Where to write it, an existing folder: file://<path>"),
        options=(
            Option(
                "overlay-directory",
                "Freeze the disks too, and go on in new images in this folder (extension)",
                "path",
                is_ours=True,
            ),
        ),
        doing="Writing the snapshot",
    ),
    Subcommand(
        "snapshot-progress", "How far a snapshot is (extension)", "vm.snapshot-progress", "GET", is_ours=True
    ),
)

BY_NAME = {subcommand.name: subcommand for subcommand in SUBCOMMANDS}
