"""`cloudvmm-remote` as a program: run with words, told what it printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 30.0

_SCRIPT = "import sys; from cloudvmm.cli.remote.main import main; sys.exit(main())"
_LOG_LINE = re.compile(r"^\[\S+Z (ERROR \w+)\] ", re.MULTILINE)


class Outcome(NamedTuple):
    """`err` has `TIME` where a log line has the time."""

    status: int
    out: str
    err: str

    def chain(self) -> list[str]:
        """The numbered lines, without their numbers."""
        return re.findall(r"^  [\dX]+: (.*)$", self.err, re.MULTILINE)


class Remote:
    """Runs the program under `name`, with `flags` before what each call adds."""

    def __init__(self, folder: Path, *flags: str, name: str = "cloudvmm-remote") -> None:
        self.path = folder / name
        self.path.write_text(f"#!{sys.executable}\n{_SCRIPT}\n")
        self.path.chmod(0o755)
        self.flags = flags

    def __call__(
        self,
        *words: str,
        fds: Sequence[int] = (),
        stdin: bytes = b"",
        stdout: int = subprocess.PIPE,
        env: Mapping[str, str] | None = None,
    ) -> Outcome:
        done = subprocess.run(
            [str(self.path), *self.flags, *words],
            input=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            timeout=TIMEOUT_S,
            pass_fds=fds,
            env={**os.environ, **(env or {})},
            check=False,
        )
        err = _LOG_LINE.sub(r"[TIME \1] ", done.stderr.decode())
        return Outcome(done.returncode, (done.stdout or b"").decode(), err)
