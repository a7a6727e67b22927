"""The commands that a page of the documents shows, and running them as a reader would: from the top.

Each `sh` and `python` block is run, unless the line above it says `Not run by the tests: REASON.`
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("sh", "python")
SILENT = ("ini", "json", "mermaid", "text")
TIMEOUT_S = 150.0
BIN = Path(sys.executable).parent

_BLOCK = re.compile(
    r"(?:^Not run by the tests: (?P<reason>[^\n]*)\.\n\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_HERE = "cloudvmm_block"
# A page leaves servers behind; they are to end as a reader would end them.
_END_OF_JOBS = "trap 'kill $(jobs -p) 2>/dev/null || :; wait' EXIT\n"


class Block(msgspec.Struct, frozen=True):
    """`reason` is why it is not run; None where it is."""

    language: str
    text: str
    reason: str | None


def pages() -> list[str]:
    """Return README.md and every page below docs/, by their names in the repository."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


def blocks_of(name: str) -> list[Block]:
    return blocks_in((ROOT / name).read_text(encoding="utf-8"))


def blocks_in(text: str) -> list[Block]:
    return [Block(found["language"], found["text"], found["reason"]) for found in _BLOCK.finditer(text)]


def script_of(blocks: list[Block]) -> str:
    """Return one shell script that does what the blocks say, one after the other, and stops at a failure.

    Python blocks with no shell between them are one program, as they are for who types them.
    """
    run = [block for block in blocks if block.language in LANGUAGES and block.reason is None]
    parts = []
    for language, same in itertools.groupby(run, key=lambda block: block.language):
        text = "\n".join(block.text for block in same)
        parts.append(text if language == "sh" else f"python3 - <<'{_HERE}'\n{text}{_HERE}\n")
    return "\n".join(parts)


def run_script(script: str, folder: Path) -> str:
    """Run `script` with `folder` in place of /tmp; return what it printed. All that it started is ended.

    :raises AssertionError: it failed, or did not end in time.
    """
    printed = folder.with_name(f"{folder.name}.printed")
    with printed.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", _END_OF_JOBS + script.replace("/tmp/", f"{folder}/")],
            cwd=folder,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        status: int | str = process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = "of none, being stuck"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text = printed.read_text(errors="replace")
    assert status == 0, f"Status {status} of\n{script}\nwhich printed\n{text}"
    return text
