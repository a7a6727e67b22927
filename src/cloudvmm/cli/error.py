"""Errors of the command line; the texts of the reference's flags are the reference's.

A usage error is not among them: the parser prints it and exits with status 2.
"""

from __future__ import annotations

from cloudvmm.errors import VmmError

_EVENT_MONITOR = "path=<path> or fd=<number>"
_PEER = "uid=<number>"
_GDB = "path=<path>"


class FlagError(VmmError):
    """Root of the tree; never raised itself. `hint` tells what is allowed, in no text of the reference."""

    hint: str | None = None


class ParsingConfig(FlagError):
    """Error parsing config"""


class ParsingApiSocket(FlagError):
    """Error parsing --api-socket"""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.hint = f"<path>, path=<path> or fd=<number>; given: fd={given}"


class ParsingApiSocketPeers(FlagError):
    """Error parsing --api-socket-peers"""

    hint = _PEER


class BareApiSocketPeer(FlagError):
    """Error parsing --api-socket-peers: uid required"""

    hint = _PEER


class ParsingEventMonitor(FlagError):
    """Error parsing --event-monitor"""

    hint = _EVENT_MONITOR


class BareEventMonitor(FlagError):
    """Error parsing --event-monitor: path or fd required"""

    hint = _EVENT_MONITOR


class ParsingGdb(FlagError):
    """Error parsing --gdb"""

    hint = _GDB


class BareGdb(FlagError):
    """Error parsing --gdb: path required"""

    hint = _GDB


class ParsingRestore(FlagError):
    """Error parsing restore"""


class ParsingMaxConnections(FlagError):
    """Error parsing --max-connections"""

    def __init__(self, given: str, most: int) -> None:
        super().__init__()
        self.hint = f"a number from 1 to {most}; given: {given}"


class ParsingQemuCgroup(FlagError):
    """Error parsing --qemu-cgroup"""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.hint = f"the absolute path of a folder of cgroup2 that may be written to; given: {given}"


class ParsingQemuUser(FlagError):
    """Error parsing --qemu-user"""

    def __init__(self, given: str) -> None:
        super().__init__()
        self.hint = f"auto, root, or the name or number of a user; given: {given}"


class ParsingMaxVmms(FlagError):
    """Error parsing --max-vms"""

    def __init__(self, given: str, most: int) -> None:
        super().__init__()
        self.hint = f"a number from 1 to {most}; given: {given}"


class CountOutOfRange(FlagError):
    def __init__(self, count: int, most: int) -> None:
        super().__init__(f"{count} is not in the range from 1 to {most}")


class MissingDbusObjectPath(FlagError):
    """`--dbus-object-path` option isn't provided"""


class MissingDbusServiceName(FlagError):
    """`--dbus-service-name` option isn't provided"""


class LogFileCreation(FlagError):
    """Error creating log file"""


class TraceFileCreation(FlagError):
    """Error creating trace file"""


class LoggerFormat(FlagError):
    """Error parsing logger format"""

    def __init__(self, given: str, tokens: str) -> None:
        super().__init__()
        self.hint = f"--log-format of text, {{{{, }}}} and {tokens}; given: {given}"


class InvalidDescriptor(FlagError):
    """invalid digit found in string"""


class UpgradeNeedsPath(FlagError):
    """An upgrade needs --api-socket with the path of the VMM whose VM is to be taken over"""

    hint = "--api-socket <path> or path=<path>"


class UpgradeTakesNoVm(FlagError):
    def __init__(self, flag: str) -> None:
        super().__init__(f"An upgrade takes the VM as it is: --{flag} does not go with it")


class DaemonNeedsPath(FlagError):
    """A daemon needs --api-socket with the path of its own socket"""

    hint = "--api-socket <path> or path=<path>"


class FormatError(VmmError):
    """Root of what can be wrong with a log format; always the cause of a LoggerFormat."""


class UnknownToken(FormatError):
    def __init__(self, name: str) -> None:
        super().__init__(f"Unknown format token '{{{name}}}'")


class UnterminatedBrace(FormatError):
    """Unterminated '{' in format string"""


class UnmatchedBrace(FormatError):
    """Unmatched '}' in format string"""


class StartError(VmmError):
    """Root of what ends a start; the texts are the reference's."""


class ThreadExited(VmmError):
    """VMM thread exited with error"""


class CreatingVm(StartError):
    """Error creating VM"""


class BootingVm(StartError):
    """Error booting VM"""


class RestoringVm(StartError):
    """Error restoring VM"""


class ApplyLandlockToThreads(StartError):
    """Failed to apply Landlock"""


class EventMonitorIo(StartError):
    """Error doing event monitor I/O"""
