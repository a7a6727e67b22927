"""Print an apt source for a release's backports suite, derived from the machine's own sources.

    python3 scripts/backports_source.py bookworm [/etc/apt [SUITE]]      SUITE: another than the backports

The entry is the machine's own entry for the release, with the suite's name changed: same mirror,
same key, same options, same format (one-line or deb822). The first line printed says under which
name it belongs into sources.list.d, the rest is its content. Prints nothing when the backports
suite is there already; ends with status 1 when there is no entry to derive one from. Standard
library only: it runs before anything is installed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

# deb [options] URI suite components...
_ONE_LINE = re.compile(
    r"^deb\s+(?P<options>\[[^\]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.*)$"
)
_MULTI_LINE_FIELD = re.compile(r"^(?P<name>[^\s:#]+):(?P<value>.*(?:\n[ \t].*)*)", re.MULTILINE)


def derive(apt: Path, release: str, suite: str | None = None) -> tuple[str, str] | None:
    """Return the file's name and content for `suite`, by default the backports; None when it is configured.

    :raises LookupError: when no source of `release` itself is configured.
    """
    wanted = suite or f"{release}-backports"
    found: tuple[str, str] | None = None
    one_line = [apt / "sources.list", *sorted((apt / "sources.list.d").glob("*.list"))]
    for path in filter(Path.is_file, one_line):
        for line in path.read_text().splitlines():
            if not (match := _ONE_LINE.match(line.split("#", 1)[0].strip())):
                continue
            if match["suite"] == wanted:
                return None
            if match["suite"] == release and "main" in match["components"].split():
                entry = f"deb {match['options'] or ''}{match['uri']} {wanted} main\n"
                found = found or ("cloudvmm-backports.list", entry)
    for path in sorted((apt / "sources.list.d").glob("*.sources")):
        for fields in _stanzas(path.read_text()):
            suites = fields.get("suites", "").split()
            disabled = fields.get("enabled", "yes").strip().lower() in ("no", "false", "0")
            if disabled or "deb" not in fields["types"].split():
                continue
            if wanted in suites:
                return None
            if release in suites and "main" in fields.get("components", "").split():
                fields |= {"types": " deb", "suites": f" {wanted}", "components": " main"}
                entry = "".join(f"{name.title()}:{value}\n" for name, value in fields.items())
                found = found or ("cloudvmm-backports.sources", entry)
    if found is None:
        raise LookupError(f"apt has no source for {release}")
    return found


def _stanzas(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    stanzas = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        fields = {
            found["name"].lower(): found["value"].rstrip() for found in _MULTI_LINE_FIELD.finditer(block)
        }
        if "types" in fields:
            stanzas.append(fields)
    return stanzas


def main() -> int:
    try:
        derived = derive(Path(sys.argv[2] if len(sys.argv) > 2 else "/etc/apt"), sys.argv[1], *sys.argv[3:4])
    except LookupError as error:
        print(error, file=sys.stderr)
        return 1
    if derived:
        print(derived[0], derived[1], sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
