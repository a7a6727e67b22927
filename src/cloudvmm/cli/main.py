"""The command `cloudvmm`: the drop-in's flags, and our own `guest`, `completion`, `upgrade`, `daemon`, `vms`.

The first word decides: these are our own commands, all else are Cloud Hypervisor's flags. Installed
under the name `cloud-hypervisor` it says so where clients read the name.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import time
from contextlib import closing
from functools import partial

from cloudvmm import __version__
from cloudvmm.cli.standard_file import open_standard_files
from cloudvmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloudvmm.cli.flag import Args
    from cloudvmm.cli.log import Logger
    from cloudvmm.cli.trace.start import StartTrace
    from cloudvmm.config.operation import RestoreConfig
    from cloudvmm.config.vm import VmConfig

    Serve = Callable[[Args, str | int | None, Logger], None]

# How long a thread may hold the interpreter while others wait. The default of 5 ms would let one command's
# preparations delay every answer to another client by as much.
SWITCH_INTERVAL_S = 0.0005


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cloudvmm` with `argv` (the process's own by default); return the exit status."""
    open_standard_files()
    # Inherited from whoever started us: a status that the kernel throws away could not be waited for.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["guest"]:
        return _guest(words)
    if words[:1] == ["completion"]:
        return _completion(words[1:])
    if words[:1] == ["vms"]:
        return _vms(words[1:])
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    os.umask(0o077)
    gc.disable()  # a tenth of the start went by looking for garbage where none is; `serve.warm_up` ends it
    try:
        if words[:1] == ["daemon"]:
            return _daemon(words[1:])
        is_upgrade = words[:1] == ["upgrade"]
        return _run(words[1:] if is_upgrade else words, program=_program(), is_upgrade=is_upgrade)
    except (OSError, ImportError) as error:
        if not _is_shortage(error):
            raise
        # Nothing can be loaded any more, be it to say so as all else is said.
        os.write(2, b"Error: Too many open files: fewer are allowed here than a start takes (ulimit -n)\n")
        return 1
    finally:
        gc.enable()


def _is_shortage(error: OSError | ImportError) -> bool:
    """Tell whether there was no descriptor to read our code with; of a library that is an ImportError."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return os.strerror(errno.EMFILE) in str(error)


def _program() -> str:
    name = os.path.basename(sys.argv[0])
    return name if name in ("cloudvmm", "cloud-hypervisor") else "cloudvmm"


def _run(words: list[str], *, program: str, is_upgrade: bool) -> int:
    begun_ns = time.monotonic_ns()
    from cloudvmm.cli.flag import parse_args

    args = parse_args(words, program=f"{program} upgrade" if is_upgrade else program)
    if args.version:
        return _print_version(args, program)
    times_ns = (begun_ns, time.monotonic_ns())
    return _live(args, program, partial(_serve_traced, times_ns=times_ns, is_upgrade=is_upgrade))


def _daemon(words: list[str]) -> int:
    from cloudvmm.cli.daemon import parse_daemon_args, run_daemon

    program = _program()
    args = parse_daemon_args(words, program=program)
    if args.version:
        return _print_version(args, program)
    return _live(args, program, run_daemon)


def _vms(words: list[str]) -> int:
    from cloudvmm.cli.vms import run_vms

    return run_vms(words, program=_program())


def _live(args: Args, program: str, serve: Serve) -> int:
    """Read where the API socket is to be, open the log, and `serve`; return the exit status."""
    log: Logger | None = None
    try:
        from cloudvmm.cli.flag_value import parse_api_socket
        from cloudvmm.cli.log import open_log

        api_socket = None if args.api_socket is None else parse_api_socket(args.api_socket)
        log = open_log(verbosity=args.v, log_file=args.log_file, log_format=args.log_format)
        log.info(f"{program} {_version(program)} starting")
        serve(args, api_socket, log)
        log.info("Cloud Hypervisor exited successfully")
    except VmmError as error:
        if log is not None:
            from cloudvmm.cli.fatal import fatal_text

            log.error(fatal_text(error))
        from cloudvmm.cli.serve import report

        report(error)
        return 1
    finally:
        if log is not None:
            log.close()
    return 0


def _print_version(args: Args, program: str) -> int:
    from cloudvmm.cli.flag import version_text
    from cloudvmm.control.vmm import FEATURES

    text = version_text(_version(program), program=program, features=FEATURES, verbosity=args.v)
    sys.stdout.write(text)
    return 0


def _version(program: str) -> str:
    from cloudvmm.control.vmm import REFERENCE_VERSION

    # Clients that ask for `cloud-hypervisor` compare the number with the release that they need.
    return __version__ if program == "cloudvmm" else f"v{REFERENCE_VERSION}"


def _serve_traced(
    args: Args,
    api_socket: str | int | None,
    log: Logger,
    *,
    times_ns: tuple[int, int],
    is_upgrade: bool,
) -> None:
    """Serve, and trace it where the flags ask for it; our code began, and knew them, at `times_ns`."""
    if args.trace is None:
        _serve(args, api_socket, log, None, is_upgrade=is_upgrade)
        return
    from cloudvmm.cli.serve import load_commands
    from cloudvmm.cli.trace.start import StartTrace

    with closing(StartTrace(args.trace, *times_ns)) as trace:
        load_commands()  # what is traced is to be there
        _serve(args, api_socket, log, trace, is_upgrade=is_upgrade)


def _serve(
    args: Args,
    api_socket: str | int | None,
    log: Logger,
    trace: StartTrace | None,
    *,
    is_upgrade: bool,
) -> None:
    from cloudvmm.cli.engine import choose_engine
    from cloudvmm.cli.flag import check_dbus, check_upgrade, wants_vm
    from cloudvmm.cli.flag_value import (
        parse_api_socket_peers,
        parse_event_monitor,
        parse_gdb,
        parse_max_connections,
    )
    from cloudvmm.cli.serve import DbusSettings, Settings, serve

    def read_vm_config() -> VmConfig:
        from cloudvmm.cli.vm_flag import build_vm_config

        return build_vm_config(args, log.warn)

    def read_restore() -> RestoreConfig:
        from cloudvmm.cli.vm_flag import read_restore

        return read_restore(args.restore)

    if trace is not None:
        trace.is_loaded()
    if is_upgrade:
        check_upgrade(args, api_socket)
    serve(
        Settings(
            engine=choose_engine(args, log, trace),
            log=log.log,
            api_socket=api_socket,
            event_monitor=None if args.event_monitor is None else parse_event_monitor(args.event_monitor),
            read_vm_config=read_vm_config if wants_vm(args) else None,
            read_restore=read_restore if args.restore is not None else None,
            dbus=DbusSettings(args.dbus_service_name, args.dbus_object_path, system_bus=args.dbus_system_bus)
            if check_dbus(args)
            else None,
            state_dir=args.state_dir,
            no_shutdown=args.no_shutdown,
            gdb_socket=None if args.gdb is None else parse_gdb(args.gdb),
            max_connections=parse_max_connections(args.max_connections),
            peers=parse_api_socket_peers(args.api_socket_peers),
            is_upgrade=is_upgrade,
            has_landlock=args.landlock,
            on_ready=None if trace is None else trace.is_ready,
        )
    )


def _completion(words: list[str]) -> int:
    from cloudvmm.cli.completion import run_completion

    return run_completion(words, program=_program())


def _guest(words: list[str]) -> int:
    import argparse

    from cloudvmm.cli.guest import add_guest_parser, run_guest

    parser = argparse.ArgumentParser(prog="cloudvmm")
    add_guest_parser(parser.add_subparsers(dest="command", required=True))
    return run_guest(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
