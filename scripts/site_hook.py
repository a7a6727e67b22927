"""What mkdocs must be told to make a site of docs/ as it is read in the repository.

Some pages lie outside docs/ and belong to the site all the same. Links between pages are turned accordingly;
one that leads to a file which is not on the site, such as a source, becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    return turn_links(markdown, page.file.src_uri)


def turn_links(markdown: str, name: str) -> str:
    """Return the text of the site's page `name` with links that hold there."""
    source = ROOT / name if name in OUTSIDE else DOCS / name
    parts, position = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_turn(markdown[position : fence.start()], source, name), fence.group()]
        position = fence.end()
    return "".join([*parts, _turn(markdown[position:], source, name)])


def _turn(text: str, source: Path, name: str) -> str:
    return _LINK.sub(lambda link: _turned(link.group(1), link.group(2), source, name), text)


def _turned(words: str, target: str, source: Path, name: str) -> str:
    path, hash_sign, anchor = target.partition("#")
    if not path or re.match(r"[a-z][a-z0-9+.-]*:", target):
        return f"[{words}]({target})"
    aim = _site_name(Path(os.path.normpath(source.parent / path)))
    if aim is None:
        return words
    relative = os.path.relpath(aim, os.path.dirname(name) or ".")
    return f"[{words}]({relative}{hash_sign}{anchor})"


def _site_name(path: Path) -> str | None:
    if path.parent == ROOT and path.name in OUTSIDE:
        return path.name
    if path.is_relative_to(DOCS) and not path.is_dir():
        return path.relative_to(DOCS).as_posix()  # whether it is there is for mkdocs to say
    return None
