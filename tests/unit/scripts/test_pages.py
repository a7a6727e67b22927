"""The pages that follow from the code are what their programs write, and the site's links hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import site_hook
import write_api_pages
import write_option_page
from cloudvmm.api import COMMANDS, STREAMS
from cloudvmm.cli.flag import FLAGS
from cloudvmm.options.table import SCHEMAS

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"


def headings(text):
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("module", [write_api_pages, write_option_page], ids=lambda one: one.__name__)
def test_pages_are_what_the_code_says(module):
    assert module.main(["--check"]) == 0, f"out of date: run scripts/{module.__name__}.py"


def test_reference_has_no_page_that_nobody_writes():
    written = {*write_api_pages.render(), write_option_page.PAGE}
    assert set((DOCS / "reference").rglob("*.md")) == written


def test_api_page_that_is_old_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(write_api_pages, "FOLDER", tmp_path)
    assert write_api_pages.main(["--check"]) == 1
    assert write_api_pages.main([]) == 0
    assert write_api_pages.main(["--check"]) == 0


def test_option_page_that_is_old_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(write_option_page, "PAGE", tmp_path / "options.md")
    assert write_option_page.main(["--check"]) == 1
    assert write_option_page.main([]) == 0
    assert write_option_page.main(["--check"]) == 0


def test_every_command_and_stream_has_its_section_once():
    sections = [
        heading
        for name, text in write_api_pages.pages().items()
        if name.startswith("api/")
        for heading in headings(text)
        if heading.startswith(("vm.", "vmm."))
    ]
    assert sorted(sections) == sorted(one.name for one in (*COMMANDS, *STREAMS))


def test_every_flag_and_option_string_is_on_the_page():
    page = write_option_page.render()
    assert [flag.name for flag in FLAGS if f"`--{flag.name}`" not in page] == []
    assert set(SCHEMAS) <= set(headings(page))


@pytest.mark.parametrize(
    ("name", "text", "turned"),
    [
        ("guest.md", "[a](adr/x.md#y)", "[a](adr/x.md#y)"),
        ("compatibility.md", "[a](../SECURITY.md)", "[a](SECURITY.md)"),
        ("adr/1.md", "[a](../../CONTRIBUTING.md#b)", "[a](../CONTRIBUTING.md#b)"),
        ("CONTRIBUTING.md", "[a](docs/architecture.md)", "[a](architecture.md)"),
        ("CONTRIBUTING.md", "[a](changelog.d/README.md)", "a"),
        ("state-machine.md", "[`a`](../src/cloudvmm/errors.py)", "`a`"),
        ("guest.md", "[a](https://example.org/x) [b](#c)", "[a](https://example.org/x) [b](#c)"),
        ("guest.md", "```sh\n[a](../x)\n```\n", "```sh\n[a](../x)\n```\n"),
    ],
)
def test_link_on_the_site(name, text, turned):
    assert site_hook.turn_links(text, name) == turned


def test_every_page_is_in_the_site_s_index_and_in_the_one_that_is_read_in_the_repository():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages | set(site_hook.OUTSIDE) == set(names_in(navigation()))
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    by_hand = {name for name in pages if not name.startswith("reference/api/")} - {"README.md"}
    assert [name for name in sorted(by_hand) if f"({name})" not in index] == []


def navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text[text.index("\nnav:") :])["nav"]


def names_in(entry):
    match entry:
        case str():
            yield entry
        case list():
            for one in entry:
                yield from names_in(one)
        case dict():
            for one in entry.values():
                yield from names_in(one)
