"""What the documents point at is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
# Not `vmm/src/lib.rs`: that is Cloud Hypervisor's.
OUR_SOURCE = re.compile(r"(?<![\w/.-])(?:src|scripts|examples|benches|tests|fuzz)/[\w./-]*\w")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def documents():
    """Give every Markdown file of the repository, none of what tools leave in it."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.md")
        if not any(
            part.startswith(".") or part == "node_modules" for part in path.relative_to(ROOT).parts[:-1]
        )
    )


def prose_of(path):
    """Return the text without code, in which a bracket is not a link."""
    return CODE_SPAN.sub("", FENCE.sub("", path.read_text(encoding="utf-8")))


def anchors_of(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in HEADING.findall(text)
    }


def dead_links(path):
    dead = []
    for target in LINK.findall(prose_of(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        aim = (path.parent / name).resolve() if name else path
        is_dead = not aim.exists() or (anchor and aim.suffix == ".md" and anchor not in anchors_of(aim))
        dead += [target] if is_dead else []
    return dead


LIMITS = ROOT / "docs" / "limits.md"
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_each_limit_names_a_test_that_is_there():
    rows = [line for line in LIMITS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.endswith("| Test |")]
    assert len(rows) > 30
    for row in rows:
        found = NAMED_TEST.search(row)
        assert found, f"no test is named: {row}"
        path, name = found.groups()
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{name} is not in {path}"


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/compatibility.md"} <= set(
        documents()
    )


@pytest.mark.parametrize("name", documents())
def test_relative_links_are_alive(name):
    assert dead_links(ROOT / name) == []


@pytest.mark.parametrize("name", documents())
def test_named_paths_of_ours_exist(name):
    named = OUR_SOURCE.findall((ROOT / name).read_text(encoding="utf-8"))

    assert [path for path in named if not (ROOT / path).exists()] == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[here](#a-page) [gone](gone.md) [nowhere](#nowhere) [out](https://example.org/x)\n"
        "```\n[code](not-a-link.md)\n```\n",
        encoding="utf-8",
    )

    assert dead_links(page) == ["gone.md", "#nowhere"]


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def test_every_claim_about_security_names_a_test_that_is_there():
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    named = NAMED_TEST.findall(text)
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("| ") and " | Tried by |" not in line]
    assert [row for row in rows if not NAMED_TEST.search(row)] == []
    assert len(rows) > 30
