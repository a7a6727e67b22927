"""`cloudvmm daemon`: many VMs in one process, each with a plain socket, made over the daemon's own.

The life of the process is here; what a VMM is, and how it is made and ended, is `cloudvmm.daemon`'s.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from cloudvmm.cli.error import DaemonNeedsPath
from cloudvmm.cli.flag import FLAGS, Args, Flag, Group
from cloudvmm.cli.flag_value import parse_api_socket_peers, parse_max_connections, parse_max_vmms
from cloudvmm.cli.parser import build_parser
from cloudvmm.cli.usage import USAGE_STATUS
from cloudvmm.errors import VmmError, error_chain

if TYPE_CHECKING:
    from cloudvmm.cli.log import Logger
    from cloudvmm.daemon.fleet import Fleet
    from cloudvmm.host.eventfd import EventFd
    from cloudvmm.http.listener import Listener
    from cloudvmm.http.server import HttpServer

OWN_CONNECTIONS: Final = 64  # one that deletes a VMM waits for its end
END_S: Final = 60.0
_HTTP_END_S: Final = 1.0
_DESCRIPTORS_PER_VMM: Final = 64

_SHARED = (
    *("accel", "api-socket", "api-socket-peers", "engine", "log-file", "log-format"),
    *("max-connections", "qemu", "qemu-cgroup", "qemu-landlock", "qemu-user", "seccomp", "state-dir"),
)
_HELP = {
    "api-socket": "The daemon's own socket (UNIX domain socket): path=<path>",
    "api-socket-peers": "Users that may connect, here and to each VM: uid=<uid>; all that can if not given",
    "max-connections": "HTTP connections at a time to each VM; streams do not count",
    "state-dir": "Folder for the list of VMs, and for the journal and the files of each",
}


def _shared(flag: Flag) -> Flag:
    return Flag(
        flag.name, flag.group, flag.arity, flag.default, flag.choices, _HELP.get(flag.name, flag.help)
    )


DAEMON_FLAGS = tuple(
    sorted(
        (
            *(_shared(flag) for flag in FLAGS if flag.name in _SHARED),
            Flag("max-vms", Group.VMM, default="256", help="VMs that there may be at a time"),
            Flag("socket-dir", Group.VMM, help="Folder of the VMs' sockets; <api-socket>.d if not given"),
        ),
        key=lambda flag: flag.name,
    )
)


class SocketFolderFailed(VmmError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The folder of the VMs' sockets {path!r} cannot be used")


def parse_daemon_args(argv: Sequence[str], *, program: str) -> Args:
    """Read the command line behind `daemon`. Prints help or a usage error and exits where that is due."""
    parser = build_parser(
        f"{program} daemon",
        with_help=not argv or "-h" in argv or "--help" in argv,
        flags=DAEMON_FLAGS,
        description="Hold many VMs, each with a socket of its own.",
    )
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(USAGE_STATUS)
    return parser.parse_words(argv, Args())


def run_daemon(args: Args, api_socket: str | int | None, log: Logger) -> None:
    """Run until the daemon ends, by a command or a signal.

    :raises VmmError: the start failed, or VMs did not end in time.
    """
    from cloudvmm.cli.engine import choose_engine
    from cloudvmm.daemon.fleet import Fleet
    from cloudvmm.daemon.registry import Registry
    from cloudvmm.http.listener import Listener

    if not isinstance(api_socket, str):
        raise DaemonNeedsPath
    peers = parse_api_socket_peers(args.api_socket_peers)
    max_vms, max_connections = parse_max_vmms(args.max_vms), parse_max_connections(args.max_connections)
    _raise_descriptor_limit(max_vms)
    socket_dir = os.path.abspath(args.socket_dir or f"{api_socket}.d")
    with contextlib.ExitStack() as undo:
        # First of all: it tells whether another daemon is there, and what that has is not to be touched.
        listener = Listener.at_path(api_socket)
        undo.callback(listener.close, remove_socket=True)
        _make_folder(socket_dir, undo, is_chosen=args.socket_dir is not None)
        registry = None
        if args.state_dir is not None:
            registry = Registry(os.path.abspath(args.state_dir))
        fleet = Fleet(
            choose_engine(args, log),
            socket_dir=socket_dir,
            max_vmms=max_vms,
            max_connections=max_connections,
            peers=peers,
            log=log.log,
            registry=registry,
        )
        undo.callback(fleet.close)
        fleet.restore()  # who asks meanwhile waits
        _serve(fleet, listener, log, peers)


def _serve(fleet: Fleet, listener: Listener, log: Logger, peers: frozenset[int] | None) -> None:
    from cloudvmm.cli.serve import ExitSignals, warm_up
    from cloudvmm.daemon.service import DaemonService
    from cloudvmm.host.eventfd import EventFd
    from cloudvmm.http.server import HttpServer

    exit_evt = EventFd()
    signals = ExitSignals(exit_evt.write, log.log)
    service = DaemonService(fleet, exit_evt.write)
    server = HttpServer(listener, service, max_connections=OWN_CONNECTIONS, peers=peers, log=log.log)
    try:
        warm_up(fleet.engine, log.log)
        _wait(exit_evt)
    finally:
        _end(fleet, server, log)
        signals.close()
        exit_evt.close()


def _wait(exit_evt: EventFd) -> None:
    poller = select.poll()
    poller.register(exit_evt, select.POLLIN)
    poller.poll()


def _end(fleet: Fleet, server: HttpServer, log: Logger) -> None:
    """End what is there, the API last. What does not end is killed with the process."""
    fleet.end()
    try:
        fleet.wait(END_S)
    except VmmError as error:
        log.error(", ".join(error_chain(error)))
        raise
    finally:
        server.close(remove_socket=True, deadline_s=_HTTP_END_S)


def _make_folder(path: str, undo: contextlib.ExitStack, *, is_chosen: bool) -> None:
    """One that the user has not chosen has to be ours: anybody may have made it, in /tmp for one."""
    from cloudvmm.host.own_folder import FolderNotOurs, check_own

    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise SocketFolderFailed(path) from NotADirectoryError(20, "Not a directory", path)
        if not is_chosen:
            try:
                check_own(path)
            except (FolderNotOurs, OSError) as error:
                raise SocketFolderFailed(path) from error
    except OSError as error:
        raise SocketFolderFailed(path) from error
    undo.callback(_remove_folder, path)


def _remove_folder(path: str) -> None:
    with contextlib.suppress(OSError):  # somebody's files are in it
        os.rmdir(path)


def _raise_descriptor_limit(max_vms: int) -> None:
    """Let the process open what that many VMs need, as far as it may."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, max_vms * _DESCRIPTORS_PER_VMM)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft not in (wanted, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
