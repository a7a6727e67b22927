"""Write docs/openapi.json, the API's document, so that it can be read without a server.

python scripts/write_openapi.py            write the file
python scripts/write_openapi.py --check    status 1 where the file is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from cloudvmm.http.openapi import document

FILE = Path(__file__).resolve().parent.parent / "docs" / "openapi.json"


def render() -> bytes:
    """Return the whole file."""
    return msgspec.json.format(msgspec.json.encode(document()), indent=1) + b"\n"


def main(arguments: list[str]) -> int:
    """Write or check the file; return the exit status."""
    if "--check" not in arguments:
        FILE.write_bytes(render())
        return 0
    if FILE.read_bytes() == render():
        return 0
    print(f"{FILE} is out of date: run scripts/write_openapi.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
