"""The command `cloudvmm`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `cloudvmm` with `argv` (the process's own by default); return the exit status.

    The first word decides: `guest` is our own command, all else are Cloud Hypervisor's flags.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["guest"]:
        return _guest(words)
    print("cloudvmm: only `cloudvmm guest` is there yet", file=sys.stderr)
    return 1


def _guest(words: list[str]) -> int:
    import argparse

    from cloudvmm.cli.guest import add_guest_parser, run_guest

    parser = argparse.ArgumentParser(prog="cloudvmm")
    add_guest_parser(parser.add_subparsers(dest="command", required=True))
    return run_guest(parser.parse_args(words))


if __name__ == "__main__":
    sys.exit(main())
