"""The apt source for backports, derived from the machine's own sources."""

import importlib.util
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "scripts" / "backports_source.py"


@pytest.fixture
def derive():
    spec = importlib.util.spec_from_file_location("backports_source", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.derive


@pytest.fixture
def apt(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def test_one_line_entry_keeps_mirror_and_options(derive, apt):
    (apt / "sources.list").write_text(
        "# deb http://old/debian bookworm main\n"
        "deb-src http://mirror/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm main contrib # ours\n"
        "deb http://mirror/security bookworm-security main\n"
    )

    assert derive(apt, "bookworm") == (
        "cloudvmm-backports.list",
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm-backports main\n",
    )


def test_deb822_entry_keeps_mirror_and_key(derive, apt):
    (apt / "sources.list.d" / "debian.sources").write_text(
        "Types: deb deb-src\n# a comment\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main non-free\nSigned-By:\n -----BEGIN\n .\n -----END\n\n"
        "Types: deb\nURIs: http://mirror/security\nSuites: bookworm-security\nComponents: main\n"
    )

    name, content = derive(apt, "bookworm")

    assert name == "cloudvmm-backports.sources"
    assert content.splitlines() == [
        "Types: deb",
        "Uris: http://mirror/debian",
        "Suites: bookworm-backports",
        "Components: main",
        "Signed-By:",
        " -----BEGIN",
        " .",
        " -----END",
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.list", "deb http://m/debian bookworm main\ndeb http://m/debian bookworm-backports main\n"),
        ("a.sources", "Types: deb\nURIs: http://m\nSuites: bookworm bookworm-backports\nComponents: main\n"),
    ],
)
def test_configured_backports_need_nothing(derive, apt, name, content):
    (apt / "sources.list.d" / name).write_text(content)

    assert derive(apt, "bookworm") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "Types: deb\nEnabled: no\nURIs: http://m\nSuites: bookworm\nComponents: main\n",
        "Types: deb-src\nURIs: http://m\nSuites: bookworm\nComponents: main\n",
        "Types: deb\nURIs: http://m\nSuites: trixie\nComponents: main\n",
    ],
    ids=["none", "disabled", "sources only", "another release"],
)
def test_machine_without_a_source_for_the_release_is_refused(derive, apt, content):
    (apt / "sources.list.d" / "a.sources").write_text(content)

    with pytest.raises(LookupError, match="no source for bookworm"):
        derive(apt, "bookworm")


def test_another_suite_is_derived_in_the_same_way(derive, apt):
    (apt / "sources.list").write_text("deb [signed-by=/k.gpg] http://mirror/debian bookworm main\n")

    assert derive(apt, "bookworm", "sid")[1] == "deb [signed-by=/k.gpg] http://mirror/debian sid main\n"
