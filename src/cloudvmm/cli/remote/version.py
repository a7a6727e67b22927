"""Under which name the program runs, and what `--version` says."""

from __future__ import annotations

import os
import sys

OUR_NAME = "cloudvmm-remote"
REFERENCE_NAME = "ch-remote"


def program_name() -> str:
    """Return the name that this program was started by, `cloudvmm-remote` unless it is the reference's."""
    return REFERENCE_NAME if os.path.basename(sys.argv[0]) == REFERENCE_NAME else OUR_NAME


def version_text(program: str) -> str:
    """Who asks for `ch-remote` compares the number with the release that it needs."""
    from cloudvmm import __version__

    if program != REFERENCE_NAME:
        return f"{program} {__version__}\n"
    from cloudvmm.control.vmm import REFERENCE_VERSION

    return f"{program} v{REFERENCE_VERSION}\n"
