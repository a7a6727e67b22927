"""A stand-in for `vhost-device-vsock`: its options and its habits, and our own device behind them."""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = '''#!{python} -P
"""As the real one: it listens at both places by itself, and replaces what its users' place holds."""
import contextlib, os, signal, socket, sys
from cloudvmm.vsock.device import Device

options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
path = options["--uds-path"]

def replace(host):
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    host.bind(path)
    host.listen(128)

host, vhost = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
replace(host)
vhost.bind(options["--socket"])
vhost.listen(1)
Device(vhost.accept()[0], host, cid=int(options["--guest-cid"]), path=path).run()
with socket.socket(socket.AF_UNIX) as again:
    replace(again)
    signal.pause()
'''


def write_stand_in(folder: Path, text: str = "") -> Path:
    """Write the program, or `text` in its place, into `folder`, which belongs on the PATH; return it."""
    program = folder / "vhost-device-vsock"
    program.write_text(text or _PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    return program
