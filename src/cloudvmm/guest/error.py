"""What can go wrong while the default guest is built, found or talked to.

GuestError
├── GuestBuildError         a tool or a file stood in the way of a build
│   ├── ToolMissing         a program of Debian's is not installed
│   ├── ToolFailed          a program ran and refused
│   └── KernelImageError    a kernel image is not what we can read
├── GuestCacheMissing       there is no folder to keep a guest in
├── GuestNotBuilt           nothing usable is in the cache
└── GuestShellError         the talk with the guest's shell service failed
    ├── GuestShellTimeout   no answer before the deadline
    ├── GuestShellClosed    the guest's end of the line is gone
    └── GuestProtocolError  the guest answered something that makes no sense
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class GuestError(VmmError):
    """The default guest is not usable"""


class GuestBuildError(GuestError):
    """The default guest could not be built"""


class ToolMissing(GuestBuildError):
    """A program is not installed: its name and the Debian package that has it."""

    def __init__(self, program: str, package: str) -> None:
        super().__init__(f"The program {program} is not installed (Debian package {package})")
        self.program = program
        self.package = package


class ToolFailed(GuestBuildError):
    """A program ended with a status other than 0; its last words are in the text."""

    def __init__(self, program: str, status: int, words: str) -> None:
        super().__init__(f"{program} ended with status {status}: {words.strip() or 'no message'}")
        self.program = program
        self.status = status


class KernelImageError(GuestBuildError):
    """The kernel image has a form that we do not know"""


class GuestCacheMissing(GuestError):
    """Neither CLOUDVMM_CACHE nor XDG_CACHE_HOME nor HOME names a folder"""


class GuestNotBuilt(GuestError):
    """The default guest is not built yet; run `cloudvmm guest build`"""


class GuestShellError(GuestError):
    """The shell service of the guest could not be used"""


class GuestShellTimeout(GuestShellError):
    """The guest did not answer in time"""


class GuestShellClosed(GuestShellError):
    """The guest closed its end of the shell service"""


class GuestProtocolError(GuestShellError):
    """The guest's answer is garbled"""
