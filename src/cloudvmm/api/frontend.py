"""Start the front ends that stand before the channel.

The front ends live above this room, so they are looked up by name when asked for: who holds a channel alone
pays for none of them, and this room knows nothing of HTTP or D-Bus.
"""

from __future__ import annotations

import importlib
from typing import Any

from cloudvmm.api.channel import ApiSender
from cloudvmm.host.eventfd import EventFd


def start_http_path_thread(path: str, api_evt: EventFd, api_sender: ApiSender, **options: Any) -> Any:
    """Serve REST on a new UNIX socket at `path`; return the running `cloudvmm.http.HttpServer`.

    :raises cloudvmm.http.HttpServerError: the socket is in use, or cannot be bound.
    """
    http = importlib.import_module("cloudvmm.http")
    return http.start_http_path_thread(path, api_evt, api_sender, **options)


def start_http_fd_thread(fd: int, api_evt: EventFd, api_sender: ApiSender, **options: Any) -> Any:
    """Serve REST on `fd`, a listening UNIX socket that belongs to the server from here on."""
    http = importlib.import_module("cloudvmm.http")
    return http.start_http_fd_thread(fd, api_evt, api_sender, **options)


def start_dbus_thread(
    service_name: str, object_path: str, api_evt: EventFd, api_sender: ApiSender, **options: Any
) -> Any:
    """Serve `org.cloudhypervisor.DBusApi1` on a message bus; return the running `cloudvmm.dbus.DbusServer`.

    :raises cloudvmm.dbus.StartingSession: there is no bus, or it does not give us the name.
    """
    dbus = importlib.import_module("cloudvmm.dbus")
    return dbus.start_dbus_thread(service_name, object_path, api_evt, api_sender, **options)
