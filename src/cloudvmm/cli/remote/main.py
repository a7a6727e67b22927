"""The command `cloudvmm-remote`: choose the way to the server, send one command, print the answer.

Started under the name `ch-remote` it says so where clients read the name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from cloudvmm.cli.remote.error import NotOpened
from cloudvmm.cli.remote.log import log_error
from cloudvmm.cli.remote.version import program_name
from cloudvmm.cli.standard_file import open_standard_files
from cloudvmm.errors import VmmError

if TYPE_CHECKING:
    from cloudvmm.cli.remote.bus import BusApi
    from cloudvmm.cli.remote.rest import RestApi

_FAILURE = 1
_INTERRUPTED = 130  # as a shell reports SIGINT

_BOTH = "`api-socket` and (dbus-service-name or dbus-object-path) are mutually exclusive"
_NEITHER = "Please either provide the api-socket option or dbus-service-name and dbus-object-path options"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cloudvmm-remote` with `argv` (the process's own by default); return the exit status."""
    from cloudvmm.cli.remote.parser import parse_args

    open_standard_files()
    try:
        args = parse_args(sys.argv[1:] if argv is None else argv, program=program_name())
        return _run(args)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Who read our output has gone. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _FAILURE


def _run(args: argparse.Namespace) -> int:
    try:
        with contextlib.closing(_api(args)) as api:
            _do(args, api)
    except NotOpened as error:
        log_error(str(error))
        return _FAILURE
    except VmmError as error:
        from cloudvmm.cli.remote.report import report

        report(error)
        return _FAILURE
    return 0


def _api(args: argparse.Namespace) -> RestApi | BusApi:
    """Choose the way to the server.

    :raises NotOpened: there is none, or it is not clear which.
    """
    has_bus = args.dbus_service_name is not None or args.dbus_object_path is not None
    if args.api_socket is not None and has_bus:
        raise NotOpened(_BOTH)
    if args.api_socket is not None:
        from cloudvmm.cli.remote.rest import RestApi

        return RestApi(args.api_socket, timeout_s=args.timeout)
    if args.dbus_service_name is None or args.dbus_object_path is None:
        raise NotOpened(_NEITHER)
    from cloudvmm.cli.remote.bus import BusApi

    return BusApi(
        args.dbus_service_name,
        args.dbus_object_path,
        is_system_bus=args.dbus_system_bus,
        timeout_s=args.timeout,
    )


def _do(args: argparse.Namespace, api: RestApi | BusApi) -> None:
    from cloudvmm.cli.remote.command import BY_NAME
    from cloudvmm.cli.remote.request import make_request
    from cloudvmm.cli.remote.rest import print_body

    if args.command == "events":
        from cloudvmm.cli.remote.event import print_events

        print_events(api, first=vars(args)["from"])
        return
    if args.command == "remove-device" and args.wait is not None:
        from cloudvmm.cli.remote.wait import remove_device

        remove_device(api, args.id, wait_s=args.wait)
        return
    api.connect()  # before any input is read
    request = make_request(args)
    if vars(args).get("wait") is not None:
        from cloudvmm.cli.remote.wait import resize

        resize(api, request, wait_s=args.wait)
        return
    doing = BY_NAME[args.command].doing
    if doing is None:
        print_body(api.call(request))
        return
    from cloudvmm.cli.remote.progress import Progress

    with Progress(doing, look=partial(api.percent_of, request.command)):
        body = api.call(request)
    print_body(body)


if __name__ == "__main__":
    sys.exit(main())
