"""A filter of system calls for a thread and all that it starts: what no machine ever needs is refused.

QEMU has a filter of its own, which knows the machine that it serves. This one is for what lies outside that
one's view: reaching into other processes, of which the thread that starts QEMU is one, the network, and what
an administrator's rights open. A refused call fails, so that a program can go on without.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Final

from cloudvmm.host.error import HostError
from cloudvmm.host.syscall import renounce_privileges, system_call

_SECCOMP: Final = 317
_SET_MODE_FILTER: Final = 1
_ALLOW: Final = 0x7FFF0000
_ERRNO: Final = 0x00050000
_ARCHITECTURE: Final = 0xC000003E  # x86-64
_OTHER_TABLES: Final = 0x40000000  # numbers from here on are of the x32 interface
_LOAD, _JUMP_EQUAL, _JUMP_NOT_LESS, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_INSTRUCTION: Final = struct.Struct("=HBBI")

_SOCKET: Final = 41
_TGKILL: Final = 234
_AF_UNIX: Final = 1

PROCESSES: Final = {
    "kill": 62,
    "ptrace": 101,
    "rt_sigqueueinfo": 129,
    "tkill": 200,
    "rt_tgsigqueueinfo": 297,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "pidfd_send_signal": 424,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "process_madvise": 440,
}
ADMINISTRATION: Final = {
    "syslog": 103,
    "pivot_root": 155,
    "adjtimex": 159,
    "chroot": 161,
    "acct": 163,
    "settimeofday": 164,
    "mount": 165,
    "umount2": 166,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "sethostname": 170,
    "setdomainname": 171,
    "iopl": 172,
    "ioperm": 173,
    "init_module": 175,
    "delete_module": 176,
    "quotactl": 179,
    "clock_settime": 227,
    "kexec_load": 246,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "unshare": 272,
    "perf_event_open": 298,
    "open_by_handle_at": 304,
    "clock_adjtime": 305,
    "setns": 308,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsmount": 432,
    "mount_setattr": 442,
}
# What goes by way of a ring passes no filter: its users do without where the kernel seems to have none.
_RINGS: Final = {"io_uring_setup": 425}


class SeccompError(HostError):
    """The kernel did not take the filter of system calls"""


def filter_thread(*, has_network: bool) -> None:
    """Refuse the calling thread, and whatever it starts, what is above, and signals to this process.

    Without `has_network` there are sockets of the UNIX kind alone.

    :raises SeccompError: the kernel refuses.
    """
    import ctypes  # see `system_call`

    program = _program(os.getpid(), has_network=has_network)
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // _INSTRUCTION.size, ctypes.addressof(instructions))
    try:
        renounce_privileges()
        system_call(_SECCOMP, _SET_MODE_FILTER, 0, header)
    except OSError as error:
        raise SeccompError from error


def _program(our_pid: int, *, has_network: bool) -> bytes:
    """Return the filter in the kernel's instructions. Each jump names how many of them it passes over."""
    refuse = _return(_ERRNO | errno.EPERM)
    absent = _return(_ERRNO | errno.ENOSYS)
    lines = [
        _INSTRUCTION.pack(_LOAD, 0, 0, _ARCHITECTURE_AT),
        *(_INSTRUCTION.pack(_JUMP_EQUAL, 1, 0, _ARCHITECTURE), refuse),
        _INSTRUCTION.pack(_LOAD, 0, 0, _NUMBER_AT),
        *(_INSTRUCTION.pack(_JUMP_NOT_LESS, 0, 1, _OTHER_TABLES), refuse),
    ]
    for number in (*PROCESSES.values(), *ADMINISTRATION.values()):
        lines += [_INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, number), refuse]
    for number in _RINGS.values():
        lines += [_INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, number), absent]
    first_argument = _INSTRUCTION.pack(_LOAD, 0, 0, _FIRST_ARGUMENT_AT)
    allow = _return(_ALLOW)
    # A signal to one of our threads would be one to us.
    lines += [
        _INSTRUCTION.pack(_JUMP_EQUAL, 0, 4, _TGKILL),
        first_argument,
        *(_INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, our_pid), refuse, allow),
    ]
    if not has_network:
        lines += [
            _INSTRUCTION.pack(_JUMP_EQUAL, 0, 4, _SOCKET),
            first_argument,
            *(_INSTRUCTION.pack(_JUMP_EQUAL, 1, 0, _AF_UNIX), refuse, allow),
        ]
    return b"".join([*lines, allow])


def _return(action: int) -> bytes:
    return _INSTRUCTION.pack(_RETURN, 0, 0, action)
