"""A file in a file system that a program serves (FUSE), for whoever mounted it alone.

The program is this file: it is told a folder to mount on and the file whose content it serves as `NAME`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

NAME: Final = "served"
_READY: Final = b"ready\n"
_ROOT, _FILE = 1, 2
_VALID_S: Final = 1000
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE, _FLUSH, _INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
_LONGEST: Final = 1 << 16
_HEAD: Final = struct.Struct("=IIQQ16x")


@contextlib.contextmanager
def served_file(folder: Path, source: Path) -> Iterator[Path]:
    """Yield the path of a file like `source`, beneath `folder`; skip the test where none can be mounted."""
    folder.mkdir()
    words = [sys.executable, __file__, str(folder), str(source)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            if program.stdout.readline() != _READY:
                pytest.skip("No FUSE can be mounted here")
            yield folder / NAME
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)
            program.kill()


def _serve(folder: str, source: str) -> None:
    content = Path(source).read_bytes()
    fd = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    if ctypes.CDLL(None).mount(b"served", os.fsencode(folder), b"fuse.served", 0, options.encode()):
        return
    os.write(1, _READY)
    while True:
        request = os.read(fd, 2 * _LONGEST)
        _, code, number, node = _HEAD.unpack_from(request)
        if code != _FORGET:
            answer = _answer(code, node, request[_HEAD.size :], content)
            failed, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
            os.write(fd, struct.pack("=IiQ", 16 + len(data), failed, number) + data)


def _answer(code: int, node: int, body: bytes, content: bytes) -> bytes | int:
    if code == _INIT:
        return struct.pack("=IIIIHHIIHH28x", 7, 31, _LONGEST, 0, 12, 10, _LONGEST, 1, 16, 0)
    if code == _LOOKUP and node == _ROOT and body == NAME.encode() + b"\0":
        return struct.pack("=QQQQII", _FILE, 0, _VALID_S, _VALID_S, 0, 0) + _attributes(_FILE, content)
    if code == _LOOKUP:
        return errno.ENOENT
    if code == _GETATTR:
        return struct.pack("=QII", _VALID_S, 0, 0) + _attributes(node, content)
    if code == _READ:
        _, start, size = struct.unpack_from("=QQI", body)
        return content[start : start + size]
    fixed = {_OPEN: bytes(16), _STATFS: bytes(80), _RELEASE: b"", _FLUSH: b""}
    return fixed.get(code, errno.ENOSYS)


def _attributes(node: int, content: bytes) -> bytes:
    mode, size = (0o040755, 0) if node == _ROOT else (0o100644, len(content))
    return struct.pack("=6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
