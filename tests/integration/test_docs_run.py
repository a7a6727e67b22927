"""What the documents show is run, page by page, as a reader would do it: every `sh` and `python` block."""

from __future__ import annotations

import os
import re

import pytest

from api_example import NOT_RUN
from support.booted import default_guest
from support.device.fs import virtiofsd_program
from support.page import LANGUAGES, ROOT, SILENT, blocks_in, blocks_of, pages, run_script, script_of

API = "docs/reference/api/"
# Every block by hand that is not run. It should stay short.
LEFT_OUT = {
    "README.md": ["these run everything else", "it needs somebody at the terminal"],
    "docs/dbus.md": ["it never ends"],
    "docs/guest.md": [
        "it needs somebody at the terminal",
        "`fd` is the console of a guest that you have booted",
    ],
    "docs/how-to/cgroup.md": ["it changes the control groups of the host"],
    "docs/how-to/ci.md": ["it installs packages"],
    "docs/how-to/devices.md": ["it takes devices from your host, and a vfio-user server"],
    "docs/how-to/kernel.md": ["it names a disk that you have"],
    "docs/how-to/share-a-folder.md": ["its options are those of the virtiofsd that you have"],
    "docs/how-to/passthrough.md": [
        "it takes a device from your host",
        "it takes a device from your host",
        "it needs a kernel with vDPA",
    ],
    "docs/performance.md": ["it takes a quarter of an hour", *["it needs that binary"] * 2],
    "docs/profiles.md": ["it boots eighty guests"],
    "docs/quickstart.md": ["it installs packages; the demo that it ends in is run as an example"],
}
PROMPT = re.compile(r"^\s*\$ ", re.MULTILINE)


def needs_guest(name):
    script = script_of(blocks_of(name))
    return "cloudvmm" in script and "--engine fake" not in script and "FakeEngine" not in script


def hand_pages():
    """Give every page with something to run that is written by hand."""
    names = [name for name in pages() if not name.startswith(API) and script_of(blocks_of(name))]
    return [pytest.param(name, marks=[pytest.mark.qemu] if needs_guest(name) else []) for name in names]


def api_pages():
    return [name for name in pages() if name.startswith(API) and script_of(blocks_of(name))]


def of_language(name, language):
    """Return the blocks of a reference page that are in `language`, behind its first, which makes ready."""
    first, *others = blocks_of(name)
    wanted = {
        "curl": lambda block: block.language == "sh" and "cloudvmm-remote" not in block.text,
        "remote": lambda block: block.language == "sh" and "cloudvmm-remote" in block.text,
        "python": lambda block: block.language == "python",
    }[language]
    return [first, *(block for block in others if wanted(block))]


@pytest.mark.parametrize("name", hand_pages())
def test_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    if needs_guest(name):
        default_guest()
    if "shared_dir=" in script_of(blocks_of(name)):
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{os.path.dirname(virtiofsd_program())}")
    printed = run_script(script_of(blocks_of(name)), folder(tmp_path))
    assert "Traceback" not in printed


@pytest.mark.parametrize("language", ["curl", "python", "remote"])
@pytest.mark.parametrize("name", api_pages())
def test_examples_of_the_reference_run_one_after_the_other(name, language, tmp_path):
    printed = run_script(script_of(of_language(name, language)), folder(tmp_path))
    assert "Error from API" not in printed


def folder(tmp_path):
    made = tmp_path / "page"
    made.mkdir()
    return made


def test_blocks_that_are_not_run_are_these():
    found = {name: [block.reason for block in blocks_of(name) if block.reason] for name in pages()}
    by_hand = {name: reasons for name, reasons in found.items() if reasons and not name.startswith(API)}
    assert by_hand == LEFT_OUT


def test_examples_of_the_reference_that_are_not_run_are_those_of_the_table():
    reasons = [block.reason for name in api_pages() for block in blocks_of(name) if block.reason]
    assert sorted(reasons) == sorted([*NOT_RUN.values()] * 3 + ["it never ends"])


def test_every_block_says_what_it_is():
    languages = {block.language for name in pages() for block in blocks_of(name)}
    assert languages <= {*LANGUAGES, *SILENT}


@pytest.mark.parametrize("name", pages())
def test_no_command_hides_in_a_block_that_is_not_run(name):
    silent = [block.text for block in blocks_of(name) if block.language in SILENT]
    assert [text for text in silent if PROMPT.search(text)] == []


@pytest.mark.parametrize("name", pages())
def test_no_code_hides_from_these_tests_by_indentation(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\n\n {4}\S", without_blocks)


def test_a_block_that_fails_is_told(tmp_path):
    text = "```sh\ntrue\n```\nwords\n```python\nraise SystemExit(3)\n```\n"
    with pytest.raises(AssertionError, match="Status 3"):
        run_script(script_of(blocks_in(text)), folder(tmp_path))


def test_a_marked_block_is_not_run(tmp_path):
    text = "Not run by the tests: it fails.\n\n```sh\nfalse\n```\n\n```sh\necho >/tmp/here\n```\n"
    here = folder(tmp_path)
    run_script(script_of(blocks_in(text)), here)
    assert [path.name for path in here.iterdir()] == ["here"]
