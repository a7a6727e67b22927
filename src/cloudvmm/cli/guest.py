"""`cloudvmm guest build|path|run`: make, find and try the default guest."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from cloudvmm.errors import error_chain
from cloudvmm.guest import FAST_CMDLINE, Guest, GuestError, build, locate

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_guest_parser(subparsers: Subparsers) -> None:
    """Add the command `guest` and its own commands to `subparsers`."""
    guest = subparsers.add_parser("guest", help="build, find and try the default guest")
    commands = guest.add_subparsers(dest="guest_command", required=True, metavar="COMMAND")
    build_parser = commands.add_parser("build", help="build the guest if it is not there, print its folder")
    build_parser.add_argument("--refresh", action="store_true", help="build anew from the current packages")
    build_parser.add_argument("--json", action="store_true", help="print all paths as JSON")
    path_parser = commands.add_parser("path", help="print where the built guest lies")
    path_parser.add_argument("--json", action="store_true", help="print all paths as JSON")
    run_parser = commands.add_parser("run", help="boot the guest on this terminal")
    run_parser.add_argument("vmm_args", nargs=argparse.REMAINDER, help="more flags for cloudvmm")


def run_guest(args: argparse.Namespace) -> int:
    """Carry out a parsed `guest` command; return the exit status."""
    try:
        match args.guest_command:
            case "build":
                _show(build(refresh=args.refresh), as_json=args.json)
            case "path":
                _show(locate(), as_json=args.json)
            case _:
                _boot(build(), args.vmm_args)
    except GuestError as error:
        print("cloudvmm guest:", ": ".join(error_chain(error)), file=sys.stderr)
        return 1
    return 0


def _show(guest: Guest, *, as_json: bool) -> None:
    print(guest.to_json() if as_json else guest.folder)


def _boot(guest: Guest, vmm_args: list[str]) -> None:
    """Become a cloudvmm that runs `guest` with its shell on this terminal."""
    argv = [sys.executable, "-m", "cloudvmm.cli.main"]
    argv += ["--kernel", guest.kernel, "--initramfs", guest.initramfs]
    argv += ["--serial", "tty", "--console", "off"]
    argv += ["--cmdline", f"{FAST_CMDLINE} cloudvmm.shell=interactive", *vmm_args]
    sys.stdout.flush()
    os.execv(sys.executable, argv)
