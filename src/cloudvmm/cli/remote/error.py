"""Errors of the remote; their texts are the reference's where it has one.

RemoteError
├── HttpApiClient        a REST call failed; caused by one of those below
│   ├── ServerResponse       the server answered with an error
│   ├── SocketFailed         the connection broke; caused by what the client says about it
│   ├── SendingDescriptors   the same, while descriptors were sent
│   └── MissingProtocol      what came back is not HTTP
├── DBusApiClient        a D-Bus call failed; caused by a BusFailure
├── NotOpened            there is no way to a server; logged, and not shown as a chain
├── NotOnDBus            the D-Bus interface lacks this
├── DeviceStays          the guest was asked for a device, and has it still
├── ConfigSyntax         an option string does not parse; caused by an OptionError
├── InvalidCpuCount
├── SizeError            the text is no size
│   ├── InvalidMemorySize
│   ├── InvalidBalloonSize
│   └── InvalidDiskSize
└── ReadingStdin, ReadingFile, ReceiveMigrationConfig, SendMigrationConfig

A usage error is not among them: the parser prints it and exits with status 2.
"""

from __future__ import annotations

from cloudvmm.errors import VmmError

_STATUS_NAMES = {
    100: "Continue",
    200: "Ok",
    204: "NoContent",
    400: "BadRequest",
    404: "NotFound",
    429: "TooManyRequests",
    500: "InternalServerError",
    501: "NotImplemented",
}


class RemoteError(VmmError):
    """Root of the tree; never raised itself. `hint` tells what is allowed, in no text of the reference."""

    hint: str | None = None


class HttpApiClient(RemoteError):
    """http client error"""


class ServerResponse(RemoteError):
    """`body` is what the server said, perhaps the chain of its errors as a JSON array of strings."""

    def __init__(self, status: int, body: str) -> None:
        self.status_name = _STATUS_NAMES.get(status, "Unknown")
        super().__init__(f"Server responded with {self.status_name}")
        self.status = status
        self.body = body

    def __repr__(self) -> str:
        """Give the form of the reference's log."""
        import msgspec

        return f"ServerResponse({self.status_name}, Some({msgspec.json.encode(self.body).decode()}))"


class SocketFailed(RemoteError):
    """Error writing to or reading from HTTP socket"""


class SendingDescriptors(RemoteError):
    """Error sending file descriptors"""


class MissingProtocol(RemoteError):
    """HTTP output is missing protocol statement"""


class DBusApiClient(RemoteError):
    """dbus api client error"""


class BusFailure(RemoteError):
    """What the bus or the service said; always the cause of a DBusApiClient."""


class NotOpened(RemoteError):
    """The text is the whole log line."""


class NotOnDBus(RemoteError):
    def __init__(self, subcommand: str) -> None:
        super().__init__(f"{subcommand} is not available over D-Bus; use --api-socket")


class DeviceStays(RemoteError):
    """The guest was asked for a device and has it still: it refused, or did nothing in time."""


class GuestLags(RemoteError):
    """The guest was asked for another size and does not have it: it refused, or was too slow."""


class ConfigSyntax(RemoteError):
    """`what` is what the option string describes."""

    def __init__(self, what: str) -> None:
        super().__init__(f"Error parsing {what} syntax")


class Reason(RemoteError):
    """Why a text cannot be read; always the cause of another error."""


class InvalidCpuCount(RemoteError):
    """Error parsing CPU count"""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.hint = f"--cpus <number>; given: {given}"


class SizeError(RemoteError):
    """Root of the sizes that do not parse, `given` as the value of `option`."""

    def __init__(self, option: str, given: str) -> None:
        super().__init__()
        self.hint = f"{option} <size>[K|M|G]; given: {given}"


class InvalidMemorySize(SizeError):
    """Error parsing memory size"""


class InvalidBalloonSize(SizeError):
    """Error parsing balloon size"""


class InvalidDiskSize(SizeError):
    """Invalid disk size"""


class ReadingStdin(RemoteError):
    """Error reading from stdin"""


class ReadingFile(RemoteError):
    """Error reading from file"""


class ReceiveMigrationConfig(RemoteError):
    """Error parsing receive migration configuration"""


class SendMigrationConfig(RemoteError):
    """Error parsing send migration configuration"""
