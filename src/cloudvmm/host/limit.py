"""Limits on what goes over a network interface in each direction, by the kernel's traffic control.

Frames that wait are held back, not dropped, as long as the queue has room for them: a token bucket filter
(tbf) sits on the interface for what is sent to it, and for what comes from it on a helper interface (ifb)
through which all of that is led. By the programs `tc` and `ip` on purpose: this is rare, and a netlink
library costs the server more memory than all of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

import msgspec

from cloudvmm.host.error import HostError

LARGEST_FRAME_BYTES: Final = 0xFFFF
"""A frame of several segments that the kernel put together is as long, others are shorter."""

_HELPER_PREFIX: Final = "cvlim"
_LEAST_QUEUE_BYTES: Final = 1 << 20
_LONGEST_FILL_S: Final = 200  # of what tbf's clock can count
_MOST_BYTES: Final = (1 << 32) - 1
_FOLDERS: Final = ("/usr/sbin", "/sbin")
_PROGRAM_TIMEOUT_S: Final = 10.0


class LimitError(HostError):
    """Root of what keeps an interface from being limited"""


class NoTrafficControl(LimitError):
    def __init__(self, program: str) -> None:
        super().__init__(f"There is no program {program} on this host: install the package iproute2")


class TrafficControlFailed(LimitError):
    """The kernel or the program refused; the text is the program's."""


class TrafficControlInUse(LimitError):
    def __init__(self, interface: str) -> None:
        super().__init__(f"The interface {interface} has a traffic control of its own")


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes_per_s` flow in, `size_bytes` stay; a frame that is shorter than `least_bytes` counts as that."""

    bytes_per_s: int
    size_bytes: int
    least_bytes: int = 0


class Limit:
    """A bucket in each direction of one interface. Owns the helper interface."""

    def __init__(self, interface: str, bucket: Bucket) -> None:
        """Blocking, some 10 ms. Limit `interface` wholly or not at all.

        What a manager that was killed left behind is cleared away first; a traffic control that is not ours
        stays, and is in the way.

        :raises LimitError: the kernel or the host lacks the means, or we lack the rights.
        """
        self._interface = interface
        self._helper = _helper_of(interface)
        _sweep()
        self.close()
        _check_unused(interface)
        with contextlib.ExitStack() as undo:
            _run("ip", [f"link add {self._helper} type ifb", f"link set {self._helper} up"])
            undo.callback(_try, "ip", [f"link del {self._helper}"])
            _run("tc", [f"qdisc add dev {interface} ingress"])
            undo.callback(_try, "tc", [f"qdisc del dev {interface} ingress"])
            self._fill(bucket)
            undo.pop_all()

    @classmethod
    def adopt(cls, interface: str) -> Limit:
        """Return the limit that another process, which is gone, has set on `interface`.

        :raises LimitError: there is no such interface.
        """
        limit = cls.__new__(cls)
        limit._interface = interface
        limit._helper = _helper_of(interface)
        return limit

    @property
    def interface(self) -> str:
        return self._interface

    def close(self) -> None:
        """Blocking, some 30 ms. Take the limits away, where there are any. Idempotent."""
        _clear(self._interface, self._helper)

    def _fill(self, bucket: Bucket) -> None:
        everything = f"filter add dev {self._interface} parent ffff: protocol all u32 match u32 0 0"
        _run(
            "tc",
            [
                f"qdisc add dev {self._helper} root {_filter(bucket)}",
                f"{everything} action mirred egress redirect dev {self._helper}",
                f"qdisc add dev {self._interface} root {_filter(bucket)}",
            ],
        )


def clear(interface: str) -> None:
    """Blocking, some 30 ms where there is something. Take away what a killed manager left on `interface`."""
    with contextlib.suppress(LimitError):  # it is gone
        _clear(interface, _helper_of(interface))


def _clear(interface: str, helper: str) -> None:
    if helper in _interfaces():
        _try("tc", [f"qdisc del dev {interface} {at}" for at in ("ingress", "root")])
        _try("ip", [f"link del {helper}"])


def _helper_of(interface: str) -> str:
    """:raises LimitError: there is no such interface."""
    try:
        return f"{_HELPER_PREFIX}{socket.if_nametoindex(interface)}"
    except OSError as error:
        raise LimitError(f"There is no interface {interface}") from error


def _filter(bucket: Bucket) -> str:
    rate = max(1, bucket.bytes_per_s)
    # Less than a frame would never let it pass.
    size = min(max(bucket.size_bytes, LARGEST_FRAME_BYTES + 1), rate * _LONGEST_FILL_S, _MOST_BYTES)
    queue = min(max(_LEAST_QUEUE_BYTES, rate // 10), _MOST_BYTES)
    least = f" mpu {bucket.least_bytes}" if bucket.least_bytes else ""
    return f"tbf rate {rate}bps burst {size} limit {queue}{least}"


def _check_unused(interface: str) -> None:
    """Look for what somebody else has set up: the kernel's own has the handle 0.

    :raises TrafficControlInUse: there is something.
    """
    for line in _run("tc", [f"qdisc show dev {interface}"]).splitlines():
        words = line.split()
        if words[:1] == ["qdisc"] and words[2] != "0:":
            raise TrafficControlInUse(interface)


def _sweep() -> None:
    """Remove helpers whose interface is gone: a manager that was killed could not."""
    indices = {index for index, _ in socket.if_nameindex()}
    for name in _interfaces():
        number = name.removeprefix(_HELPER_PREFIX)
        if number != name and number.isdecimal() and int(number) not in indices:
            _try("ip", [f"link del {name}"])


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _try(program: str, lines: list[str]) -> None:
    with contextlib.suppress(LimitError):
        _run(program, lines, keeps_on=True)


def _run(program: str, lines: list[str], *, keeps_on: bool = False) -> str:
    """Give `lines` to `ip` or `tc` as a batch, which ends at the first that fails unless it `keeps_on`.

    Returns what it prints.

    :raises LimitError: the program is not there, or a line failed.
    """
    # Rare, and not at the top for their price.
    import shutil
    import subprocess

    found = shutil.which(program, path=os.pathsep.join((os.environ.get("PATH", ""), *_FOLDERS)))
    if found is None:
        raise NoTrafficControl(program)
    try:
        return subprocess.run(
            [found, *(["-force"] if keeps_on else []), "-batch", "-"],
            input="".join(f"{line}\n" for line in lines),
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROGRAM_TIMEOUT_S,
        ).stdout
    except subprocess.CalledProcessError as error:
        raise TrafficControlFailed(_words(program, error.stderr)) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TrafficControlFailed(f"{program} failed") from error


def _words(program: str, said: str) -> str:
    told = [line for line in said.splitlines() if line.strip() and not line.startswith("Command failed")]
    return f"{program}: {'; '.join(told)}" if told else f"{program} failed"
