"""System calls made by another process, as if what runs there had been taken over."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator

from support.deadline import GUEST_S
from support.wait import wait_until

_PEEK, _POKE, _STEP, _GET, _SET, _ATTACH, _DETACH = 1, 4, 9, 12, 13, 16, 17
_NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_REGISTERS = struct.Struct(f"={len(_NAMES)}Q")
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_SYSCALL = b"\x0f\x05"
_RED_ZONE_BYTES = 4096
_WALL = 0x40000000


class Thread:
    """A thread that stands still for as long as one holds it."""

    def __init__(self, thread_id: int) -> None:
        self._id = thread_id
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.restype = ctypes.c_long
        self._instruction = _system_call_in(thread_id)

    def call(self, number: int, *arguments: int | bytes) -> int:
        """Have it make the system call; return the kernel's answer, below zero for an error.

        `bytes` are put on its stack, and it passes where they are.
        """
        before = self._registers()
        with open(f"/proc/{self._id}/mem", "r+b", buffering=0) as memory:
            place = before["rsp"] - _RED_ZONE_BYTES
            values = []
            for each in arguments:
                if isinstance(each, bytes):
                    place = (place - len(each) - 16) & ~15
                    os.pwrite(memory.fileno(), each, place)
                values.append(place if isinstance(each, bytes) else each)
            try:
                changed = {**before, "rax": number, "orig_rax": (1 << 64) - 1, "rip": self._instruction}
                for name, value in zip(_ARGUMENTS, values, strict=False):
                    changed[name] = value & ((1 << 64) - 1)
                self._set(changed)
                self._trace(_STEP)
                self._wait()
                answer = self._registers()["rax"]
            finally:
                self._set(before)
        return answer - (1 << 64) if answer >> 63 else answer

    def _registers(self) -> dict[str, int]:
        buffer = ctypes.create_string_buffer(_REGISTERS.size)
        self._trace(_GET, buffer)
        return dict(zip(_NAMES, _REGISTERS.unpack(buffer.raw), strict=True))

    def _set(self, registers: dict[str, int]) -> None:
        packed = _REGISTERS.pack(*registers.values())
        self._trace(_SET, ctypes.create_string_buffer(packed, len(packed)))

    def _trace(self, request: int, data: object = None) -> None:
        if self._libc.ptrace(ctypes.c_long(request), ctypes.c_long(self._id), None, data) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def _wait(self) -> None:
        done: list[int] = []

        def has_stopped() -> bool:
            waited, status = os.waitpid(self._id, _WALL | os.WNOHANG)
            done[:] = [status] if waited else []
            return bool(done)

        wait_until(has_stopped, "the thread stands still", timeout_s=GUEST_S)
        assert os.WIFSTOPPED(done[0]), f"the process ended: {done[0]:#x}"


def _system_call_in(pid: int) -> int:
    """Where a process has the instruction; one put there would be run by its other threads too."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            place, rights, _ = line.split(maxsplit=2)
            start, end = (int(each, 16) for each in place.split("-"))
            if "x" in rights and end < 1 << 63:
                found = os.pread(memory.fileno(), end - start, start).find(_SYSCALL)
                if found >= 0:
                    return start + found
    raise AssertionError(f"process {pid} has no system call in its code")


@contextlib.contextmanager
def held(pid: int) -> Iterator[Thread]:
    """Stop the first thread of a process for the moment, to make it do what it would not by itself."""
    thread = Thread(pid)
    thread._trace(_ATTACH)
    try:
        thread._wait()
        yield thread
    finally:
        with contextlib.suppress(ProcessLookupError):  # it did not survive
            thread._trace(_DETACH)
