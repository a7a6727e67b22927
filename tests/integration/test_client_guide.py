"""The programs in docs/client.md run, one after the other, against a server on the fake engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "client.md"
LIMIT_S = 60


def test_programs_of_the_guide_run(fake_engine, cloudvmm_server):
    server = cloudvmm_server("--no-shutdown")
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    program = "\n".join(blocks).replace("/tmp/vmm.sock", server.socket_path)

    ended = subprocess.run(
        [sys.executable, "-W", "error", "-"], input=program, capture_output=True, text=True, timeout=LIMIT_S
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert lines[0] == "VmState.RUNNING 1"
    assert "500 VmAlreadyCreated" in lines
    assert lines[-1] == "VmState.RUNNING"
