"""The flags of `cloudvmm`, which are those of `cloud-hypervisor` and a few of ours.

Only the command line's own form is here: which flags exist, how often, which need which. The option
strings that many of them take are read in `cli/vm_flag.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from cloudvmm.cli.error import (
    BareEventMonitor,
    BareGdb,
    ConnectionsOutOfRange,
    FlagNotAvailable,
    InvalidDescriptor,
    MissingDbusObjectPath,
    MissingDbusServiceName,
    ParsingApiSocket,
    ParsingEventMonitor,
    ParsingGdb,
    ParsingMaxConnections,
    UpgradeNeedsPath,
    UpgradeTakesNoVm,
)
from cloudvmm.cli.log import DEFAULT_FORMAT
from cloudvmm.cli.usage import USAGE_STATUS, UsageParser, shape_of
from cloudvmm.options.error import Conversion, GrammarError
from cloudvmm.options.grammar import Options, parse_options, read_options

MOST_CONNECTIONS = 4096  # each is a thread
OWN_COMMANDS = (
    "Beside the flags there are the commands 'cloudvmm guest' (a small guest for first steps), "
    "'cloudvmm upgrade' (take the VM of a running cloudvmm over) and 'cloudvmm completion' (for your shell); "
    "--help behind one tells more."
)


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


class Flag(NamedTuple):
    name: str
    group: Group
    arity: Arity = Arity.ONE
    default: str | None = None
    choices: tuple[str, ...] | None = None
    help: str = ""


_VM, _PAYLOAD, _VMM, _LOGGING = Group.VM, Group.PAYLOAD, Group.VMM, Group.LOGGING
_MANY, _SWITCH = Arity.MANY, Arity.SWITCH

FLAGS = (
    Flag("accel", _VMM, default="auto", choices=("auto", "kvm", "tcg"), help="How QEMU runs the guest"),
    Flag("api-socket", _VMM, help="HTTP API socket (UNIX domain socket): path=<path> or fd=<fd>"),
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
    Flag("state-dir", _VMM, help="Folder for the journal and the files of the VM"),
    Flag("tpm", _VM, help="TPM of a swtpm socket"),
    Flag("user-device", _VM, _MANY, help="vfio-user device"),
    Flag("vdpa", _VM, _MANY, help="vDPA device"),
    Flag("vsock", _VM, help="Virtio socket device"),
    Flag("watchdog", _VM, _SWITCH, help="Add a watchdog"),
)


def parse_args(argv: Sequence[str], *, program: str = "cloudvmm") -> argparse.Namespace:
    """Read the command line without its first word.

    The result has a member per flag (`log_file`), `v` (a count), `version`, and `given`, the names of
    the flags used explicitly. Prints help or a usage error and exits where that is asked for.
    """
    parser = build_parser(program, with_help=not argv or "-h" in argv or "--help" in argv)
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(USAGE_STATUS)
    args = parser.parse_words(argv)
    _check_groups(parser, args.given)
    return args


def wants_vm(args: argparse.Namespace) -> bool:
    """Whether a VM is to be created and booted at the start."""
    return bool({"kernel", "firmware", "igvm"} & args.given)


def check_available(args: argparse.Namespace) -> None:
    """Refuse flags that would be ignored in silence; `--landlock` of a VM is `vm.create`'s to refuse.

    :raises FlagNotAvailable: for the first such flag.
    """
    if args.landlock and not wants_vm(args):
        raise FlagNotAvailable("landlock")


def check_upgrade(args: argparse.Namespace, api_socket: str | int | None) -> None:
    """Refuse what goes with a VM of one's own.

    :raises UpgradeNeedsPath: nobody knows whose VM is to be taken over.
    :raises UpgradeTakesNoVm: for the first such flag.
    """
    if not isinstance(api_socket, str):
        raise UpgradeNeedsPath
    for flag in FLAGS:
        is_of_vm = flag.group in (Group.VM, Group.PAYLOAD) or flag.name == "restore"
        if is_of_vm and flag.name in args.given:
            raise UpgradeTakesNoVm(flag.name)


def parse_api_socket(text: str) -> str | int:
    """Return the path of the socket, or the number of an inherited listening one.

    Text that is no option string is the path itself.

    :raises ParsingApiSocket: when `fd=` is not a number.
    """
    options = Options()
    with contextlib.suppress(GrammarError):  # what was read before the fault counts, as in the reference
        read_options(options, text, ("path", "fd"))
    fd = options.get("fd")
    if fd is None:
        return options.get("path") or text
    try:
        return _descriptor(fd)
    except ValueError:
        raise ParsingApiSocket(fd) from InvalidDescriptor()


def parse_max_connections(text: str) -> int:
    """Return the number of HTTP connections that there may be at a time.

    :raises ParsingMaxConnections: when `text` is no number from 1 to `MOST_CONNECTIONS`.
    """
    try:
        count = _descriptor(text)
    except ValueError:
        raise ParsingMaxConnections(text, MOST_CONNECTIONS) from InvalidDescriptor()
    if not 1 <= count <= MOST_CONNECTIONS:
        failure = ParsingMaxConnections(text, MOST_CONNECTIONS)
        raise failure from ConnectionsOutOfRange(count, MOST_CONNECTIONS)
    return count


def parse_event_monitor(text: str) -> str | int:
    """Return the path to write events to, or the number of an inherited descriptor, which wins.

    :raises ParsingEventMonitor: when `text` does not parse.
    :raises BareEventMonitor: when it has neither.
    """
    try:
        options = parse_options(text, ("path", "fd"))
        fd = options.convert("fd", _descriptor)
        if options.is_set("fd") and fd is None:
            raise Conversion("fd", "")
    except GrammarError as error:
        raise ParsingEventMonitor from error
    target = fd if fd is not None else options.get("path")
    if target is None:
        raise BareEventMonitor
    return target


def parse_gdb(text: str) -> str:
    """Return the path of the socket on which a debugger is served.

    :raises ParsingGdb: when `text` does not parse.
    :raises BareGdb: when it has no path.
    """
    try:
        options = parse_options(text, ("path",))
    except GrammarError as error:
        raise ParsingGdb from error
    path = options.get("path")
    if path is None:
        raise BareGdb
    return path


def check_dbus(args: argparse.Namespace) -> bool:
    """Return whether D-Bus is to be served.

    :raises FlagError: one of the two names is there without the other.
    """
    if args.dbus_service_name is not None and args.dbus_object_path is None:
        raise MissingDbusObjectPath
    if args.dbus_service_name is None and args.dbus_object_path is not None:
        raise MissingDbusServiceName
    return args.dbus_service_name is not None


def version_text(build_version: str, *, program: str, features: Sequence[str], verbosity: int) -> str:
    """What `--version` prints; clients take the version from the first line."""
    lines = [f"{program} {build_version}", "Migration Protocol Versions: 0"]
    if verbosity > 0:
        quoted = ", ".join(f'"{feature}"' for feature in features)
        lines.append(f"Enabled features: [{quoted}]")
    return "\n".join(lines) + "\n"


def _descriptor(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 0x7FFF_FFFF:
        raise ValueError(text)
    return int(text)


_NARGS: dict[Arity, int | str | None] = {
    Arity.ONE: None,
    Arity.MANY: "+",
    Arity.OPTIONAL: "?",
    Arity.SWITCH: 0,
}


class _Use(argparse.Action):
    """Stores the value of a flag and that it was given; refuses a second use of one for single use."""

    def __init__(self, *, flag: Flag, dest: str, **options: Any) -> None:
        super().__init__(dest=dest, nargs=_NARGS[flag.arity], **options)
        self.flag = flag

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.flag.arity is Arity.MANY:
            values = [*(getattr(namespace, self.dest) or ()), *values]
        elif self.flag.name in namespace.given:
            message = f"the argument '{shape_of(self)}' cannot be used multiple times"
            raise argparse.ArgumentError(self, message)
        elif self.flag.arity is Arity.SWITCH:
            values = True
        namespace.given.add(self.flag.name)
        setattr(namespace, self.dest, values)


def build_parser(program: str, *, with_help: bool) -> UsageParser:
    """Return the parser of all flags; texts for `--help` cost imports, so they are made where asked for."""
    parser = UsageParser(
        prog=program,
        usage="%(prog)s [OPTIONS]",
        description="Launch a VMM.",
        epilog=OWN_COMMANDS if program == "cloudvmm" else None,
    )
    parser.set_defaults(given=set())
    options = parser.add_argument_group("Options")
    for flag in FLAGS:
        _add_flag(options, flag, with_help=with_help)
    options.add_argument("-v", action="count", default=0, help="Log more; up to three times")
    options.add_argument("-V", "--version", action="store_true", help="Print version")
    options.add_argument("-h", "--help", action="help", help="Print help")
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: Flag, *, with_help: bool) -> None:
    dest = flag.name.replace("-", "_")
    options: dict[str, Any] = {}
    if flag.arity is Arity.OPTIONAL:
        options["const"] = ""
    if flag.arity is not Arity.SWITCH:
        options["metavar"] = f"<{flag.name}>"
    group.add_argument(
        f"--{flag.name}",
        dest=dest,
        action=_Use,
        flag=flag,
        default=False if flag.arity is Arity.SWITCH else flag.default,
        choices=flag.choices,
        help=_help(flag) if with_help else None,
        **options,
    )


def _help(flag: Flag) -> str:
    # The schemas of all option strings are worth importing only where someone reads them.
    from cloudvmm.options.table import syntax

    parts = [flag.help]
    if described := syntax(flag.name):
        parts.append(f'"{described}"')
    if flag.default is not None:
        parts.append(f"[default: {flag.default}]")
    if flag.choices is not None:
        parts.append(f"[possible values: {', '.join(flag.choices)}]")
    return " ".join(parts).replace("%", "%%")


def _check_groups(parser: UsageParser, given: set[str]) -> None:
    payloads = [flag.name for flag in FLAGS if flag.group is Group.PAYLOAD]
    if not given.isdisjoint(payloads):
        return
    needy = [flag.name for flag in FLAGS if flag.group is Group.VM and flag.name in given]
    if needy:
        shapes = {action.dest: shape_of(action) for action in parser._actions}
        one_of = f"<{'|'.join(f'--{name} <{name}>' for name in payloads)}>"
        used = " ".join(shapes[name.replace("-", "_")] for name in needy)
        parser.refuse(
            f"the following required arguments were not provided:\n  {one_of}", usage=f"{used} {one_of}"
        )
