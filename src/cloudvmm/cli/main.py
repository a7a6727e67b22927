"""The command `cloudvmm`: the drop-in's flags, and our own `cloudvmm guest`, `completion` and `upgrade`.

The first word decides: these are our own commands, all else are Cloud Hypervisor's flags. Installed
under the name `cloud-hypervisor` it says so where clients read the name.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cloudvmm import __version__
from cloudvmm.cli.standard_file import open_standard_files
from cloudvmm.errors import VmmError

if TYPE_CHECKING:
    import argparse

    from cloudvmm.cli.log import Logger
    from cloudvmm.config.operation import RestoreConfig
    from cloudvmm.config.vm import VmConfig
    from cloudvmm.engine.base import Engine

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
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    os.umask(0o077)
    is_upgrade = words[:1] == ["upgrade"]
    return _run(words[1:] if is_upgrade else words, program=_program(), is_upgrade=is_upgrade)


def _program() -> str:
    name = os.path.basename(sys.argv[0])
    return name if name in ("cloudvmm", "cloud-hypervisor") else "cloudvmm"


def _run(words: list[str], *, program: str, is_upgrade: bool) -> int:
    from cloudvmm.cli.flag import parse_args

    args = parse_args(words, program=f"{program} upgrade" if is_upgrade else program)
    if args.version:
        return _print_version(args, program)
    from cloudvmm.cli.serve import report

    log: Logger | None = None
    try:
        from cloudvmm.cli.flag import parse_api_socket
        from cloudvmm.cli.log import open_log

        api_socket = None if args.api_socket is None else parse_api_socket(args.api_socket)
        log = open_log(verbosity=args.v, log_file=args.log_file, log_format=args.log_format)
        log.info(f"{program} {_version(program)} starting")
        _serve(args, api_socket, log, is_upgrade=is_upgrade)
        log.info("Cloud Hypervisor exited successfully")
    except VmmError as error:
        if log is not None:
            from cloudvmm.cli.fatal import fatal_text

            log.error(fatal_text(error))
        report(error)
        return 1
    finally:
        if log is not None:
            log.close()
    return 0


def _print_version(args: argparse.Namespace, program: str) -> int:
    from cloudvmm.cli.flag import version_text
    from cloudvmm.control.vmm import FEATURES

    text = version_text(_version(program), program=program, features=FEATURES, verbosity=args.v)
    sys.stdout.write(text)
    return 0


def _version(program: str) -> str:
    from cloudvmm.control.vmm import REFERENCE_VERSION

    # Clients that ask for `cloud-hypervisor` compare the number with the release that they need.
    return __version__ if program == "cloudvmm" else f"v{REFERENCE_VERSION}"


def _serve(args: argparse.Namespace, api_socket: str | int | None, log: Logger, *, is_upgrade: bool) -> None:
    from cloudvmm.cli.flag import (
        check_available,
        check_dbus,
        check_upgrade,
        parse_event_monitor,
        parse_gdb,
        parse_max_connections,
        wants_vm,
    )
    from cloudvmm.cli.serve import DbusSettings, Settings, serve

    def read_vm_config() -> VmConfig:
        from cloudvmm.cli.vm_flag import build_vm_config

        return build_vm_config(args, log.warn)

    def read_restore() -> RestoreConfig:
        from cloudvmm.cli.vm_flag import read_restore

        return read_restore(args.restore)

    check_available(args)
    if is_upgrade:
        check_upgrade(args, api_socket)
    serve(
        Settings(
            engine=_engine(args, log),
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
            is_upgrade=is_upgrade,
        )
    )


def _engine(args: argparse.Namespace, log: Logger) -> Engine:
    """The one place where an engine is chosen."""
    if args.engine == "fake":
        from cloudvmm.engine.fake import FakeEngine

        return FakeEngine()
    from cloudvmm.engine.qemu import QemuEngine

    if args.seccomp == "log":
        log.warn("QEMU's seccomp filter cannot be told to log: there is none")
    return QemuEngine(binary=args.qemu, accel=args.accel, has_sandbox=args.seccomp in ("true", "errno"))


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
