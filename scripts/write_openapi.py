"""Write docs/openapi.json and docs/daemon-openapi.json, the API's documents, to be read without a server.

python scripts/write_openapi.py            write the files
python scripts/write_openapi.py --check    status 1 where a file is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from cloudvmm.http import daemon_openapi, openapi

FOLDER = Path(__file__).resolve().parent.parent / "docs"


def render() -> dict[Path, bytes]:
    """Return the whole of each file."""
    documents = {"openapi.json": openapi.document(), "daemon-openapi.json": daemon_openapi.document()}
    return {
        FOLDER / name: msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"
        for name, document in documents.items()
    }


def main(arguments: list[str]) -> int:
    """Write or check the files; return the exit status."""
    status = 0
    for path, text in render().items():
        if "--check" not in arguments:
            path.write_bytes(text)
        elif not path.exists() or path.read_bytes() != text:
            print(f"{path} is out of date: run scripts/write_openapi.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
