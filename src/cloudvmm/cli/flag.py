"""The flags of `cloudvmm`, which are those of `cloud-hypervisor` and a few of ours.

Only the command line's own form is here: which flags exist, how often, which need which. `parser.py` knows
all that can be wrong with it, and the help; it is loaded where the line is not plainly right. What the values
of the VMM's own flags mean is in `flag_value.py`, and those of a VM in `vm_flag.py`.
"""

from __future__ import annotations

import enum
from types import SimpleNamespace

from cloudvmm import cli
from cloudvmm.cli.log import DEFAULT_FORMAT
from cloudvmm.value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Args(SimpleNamespace):
    """A member per flag (`log_file`), `v` (a count), `version`, and `given`, the names of flags in use."""


class Arity(enum.Enum):
    ONE = "one value, once"
    MANY = "one or more values, any number of times"
    OPTIONAL = "one value or none, once"
    SWITCH = "no value, once"


class Group(enum.Enum):
    """A flag of VM needs one of PAYLOAD beside it; the others stand alone."""

    VM = "vm-config"
    PAYLOAD = "vm-payload"
    VMM = "vmm-config"
    LOGGING = "logging"
    NONE = ""


class Flag(Value):
    __slots__ = ("name", "group", "arity", "default", "choices", "help")  # noqa: RUF023

    def __init__(
        self,
        name: str,
        group: Group,
        arity: Arity = Arity.ONE,
        default: str | None = None,
        choices: tuple[str, ...] | None = None,
        help: str = "",
    ) -> None:
        self.name = name
        self.group = group
        self.arity = arity
        self.default = default
        self.choices = choices
        self.help = help

    @property
    def member(self) -> str:
        """What it is called in `Args`."""
        return self.name.replace("-", "_")

    @property
    def unset(self) -> str | bool | None:
        """What its member is without it."""
        return False if self.arity is Arity.SWITCH else self.default


_VM, _PAYLOAD, _VMM, _LOGGING = Group.VM, Group.PAYLOAD, Group.VMM, Group.LOGGING
_MANY, _SWITCH = Arity.MANY, Arity.SWITCH

FLAGS = (
    Flag("accel", _VMM, default="auto", choices=("auto", "kvm", "tcg"), help="How QEMU runs the guest"),
    Flag("api-socket", _VMM, help="HTTP API socket (UNIX domain socket): path=<path> or fd=<fd>"),
    Flag(
        "api-socket-peers",
        _VMM,
        _MANY,
        help="Users that may connect to the API socket, others may not: uid=<uid>; all that can if not given",
    ),
    Flag("balloon", _VM, help="Balloon"),
    Flag("cmdline", _VM, help="Kernel command line"),
    Flag("console", _VM, default="tty", help="Virtio console"),
    Flag("cpus", _VM, default="boot=1,max_phys_bits=46", help="Virtual CPUs"),
    Flag("dbus-object-path", _VMM, help="Object path of the D-Bus interface"),
    Flag("dbus-service-name", _VMM, help="Well-known name on the bus"),
    Flag("dbus-system-bus", _VMM, _SWITCH, help="Use the system bus instead of the session bus"),
    Flag("debug-console", _VM, default="off,iobase=0xe9", help="Debug console (port in hex)"),
    Flag("device", _VM, _MANY, help="VFIO device"),
    Flag("disk", _VM, _MANY, help="Disk"),
    Flag("engine", _VMM, default="qemu", choices=("qemu", "fake"), help="What runs the VM"),
    Flag("event-monitor", _VMM, help="Where to report events: path=<path> or fd=<fd>"),
    Flag("firmware", _PAYLOAD, help="Path to a firmware"),
    Flag("fs", _VM, _MANY, help="Shared file system (virtio-fs)"),
    Flag("fw-cfg-config", _PAYLOAD, help="What the fw_cfg device passes on"),
    Flag("gdb", _VMM, help="GDB socket (UNIX domain socket): path=<path>"),
    Flag("generic-vhost-user", _VM, _MANY, help="Any virtio device served by a vhost-user back end"),
    Flag("host-data", _VM, help="Data for a SEV-SNP guest, in hex"),
    Flag("igvm", _PAYLOAD, help="Path to an IGVM file"),
    Flag("initramfs", _VM, help="Path to an initramfs image"),
    Flag("ivshmem", _VM, help="Shared memory device"),
    Flag("kernel", _PAYLOAD, help="Path to a kernel, or to a firmware with a PVH entry point"),
    Flag("landlock", _VM, _SWITCH, help="Restrict the process to the files of the VM"),
    Flag("landlock-rules", _VM, _MANY, help="What else the process may reach"),
    Flag("log-file", _LOGGING, help="Log file; standard error if not given"),
    Flag("log-format", _LOGGING, default=DEFAULT_FORMAT, help="Log format"),
    Flag("max-connections", _VMM, default="10", help="HTTP connections at a time; streams do not count"),
    Flag("memory", _VM, default="size=512M", help="Memory"),
    Flag("memory-zone", _VM, _MANY, help="Memory zone"),
    Flag("net", _VM, _MANY, help="Network device"),
    Flag("no-shutdown", _VMM, _SWITCH, help="Stay when the guest powers off"),
    Flag("numa", _VM, _MANY, help="NUMA node"),
    Flag("pci-segment", _VM, _MANY, help="PCI segment"),
    Flag("platform", _VM, help="Platform"),
    Flag("pmem", _VM, _MANY, help="Persistent memory"),
    Flag("pvmemcontrol", _VM, _SWITCH, help="Add a pvmemcontrol device"),
    Flag("pvpanic", _VM, _SWITCH, help="Add a pvpanic device"),
    Flag("qemu", _VMM, help="Path to the QEMU program; searched for if not given"),
    Flag(
        "qemu-cgroup",
        _VMM,
        help="Control group (a folder of cgroup2) in which QEMU and its helper programs get one for each VM",
    ),
    Flag(
        "qemu-landlock",
        _VMM,
        default="true",
        choices=("true", "false"),
        help="Hold QEMU and its helper programs to the files of the VM",
    ),
    Flag(
        "qemu-user",
        _VMM,
        default="auto",
        help="User that QEMU runs as, where it is root that starts it: auto (one of its own), root,"
        " <name> or <uid>",
    ),
    Flag("rate-limit-group", _VM, _MANY, help="Rate limit that several disks share"),
    Flag("restore", _VMM, help="Restore a VM from a snapshot"),
    Flag("rng", _VM, default="src=/dev/urandom", help="Random number generator"),
    Flag("rtc", _VM, Arity.OPTIONAL, help="Virtio clock; without a value its defaults"),
    Flag(
        "seccomp",
        Group.NONE,
        default="true",
        choices=("true", "false", "log", "errno"),
        help="Seccomp filter of QEMU",
    ),
    Flag("serial", _VM, default="null", help="Serial port"),
    Flag("state-dir", _VMM, help="Folder by which the VM outlives its manager, and the next one finds it"),
    Flag("trace", _LOGGING, help="File for a trace of what takes time, in Chrome's format"),
    Flag("tpm", _VM, help="TPM of a swtpm socket"),
    Flag("user-device", _VM, _MANY, help="vfio-user device"),
    Flag("vdpa", _VM, _MANY, help="vDPA device"),
    Flag("vsock", _VM, help="Virtio socket device"),
    Flag("watchdog", _VM, _SWITCH, help="Add a watchdog"),
)


def parse_args(argv: Sequence[str], *, program: str = "cloudvmm") -> Args:
    """Read the command line without its first word.

    Prints help or a usage error and exits where that is asked for.
    """
    plain = read_plain(argv)
    if plain is not None:
        return plain
    from cloudvmm.cli.parser import parse

    return parse(argv, program=program)


def read_plain(argv: Sequence[str]) -> Args | None:
    """Read a line of flags of the VMM alone, each once and whole, and apart from its value.

    None where there is more to it, or less, or a flag may have many values: then nothing is said about it.
    The parser of all other lines takes as long to import as a third of the start of an interpreter.
    """
    args = Args(**{flag.member: flag.unset for flag in FLAGS}, v=0, version=False, given=set())
    known = {f"--{flag.name}": flag for flag in FLAGS if flag.group not in (Group.VM, Group.PAYLOAD)}
    words = iter(argv)
    for word in words:
        flag = known.get(word)
        if flag is None or flag.arity not in (Arity.ONE, Arity.SWITCH) or flag.name in args.given:
            return None
        value: str | bool = True
        if flag.arity is not Arity.SWITCH:
            value = next(words, "")
            if not _is_plain(value) or (flag.choices is not None and value not in flag.choices):
                return None
        args.given.add(flag.name)
        setattr(args, flag.member, value)
    return args if args.given else None


def _is_plain(value: str) -> bool:
    return value[:1] not in ("", "-") and value.isprintable()


def wants_vm(args: Args) -> bool:
    """Whether a VM is to be created and booted at the start."""
    return bool({"kernel", "firmware", "igvm"} & args.given)


def check_upgrade(args: Args, api_socket: str | int | None) -> None:
    """Refuse what goes with a VM of one's own.

    :raises UpgradeNeedsPath: nobody knows whose VM is to be taken over.
    :raises UpgradeTakesNoVm: for the first such flag.
    """
    if not isinstance(api_socket, str):
        raise cli.error.UpgradeNeedsPath
    for flag in FLAGS:
        is_of_vm = flag.group in (Group.VM, Group.PAYLOAD) or flag.name == "restore"
        if is_of_vm and flag.name in args.given:
            raise cli.error.UpgradeTakesNoVm(flag.name)


def check_dbus(args: Args) -> bool:
    """Return whether D-Bus is to be served.

    :raises FlagError: one of the two names is there without the other.
    """
    if args.dbus_service_name is not None and args.dbus_object_path is None:
        raise cli.error.MissingDbusObjectPath
    if args.dbus_service_name is None and args.dbus_object_path is not None:
        raise cli.error.MissingDbusServiceName
    return args.dbus_service_name is not None


def version_text(build_version: str, *, program: str, features: Sequence[str], verbosity: int) -> str:
    """What `--version` prints; clients take the version from the first line."""
    lines = [f"{program} {build_version}", "Migration Protocol Versions: 0"]
    if verbosity > 0:
        quoted = ", ".join(f'"{feature}"' for feature in features)
        lines.append(f"Enabled features: [{quoted}]")
    return "\n".join(lines) + "\n"
