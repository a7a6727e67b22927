"""What is kept of programs, and for how long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloudvmm.engine.qemu import cache
from cloudvmm.engine.qemu.cache import MAX_KEPT, about_program

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def make_program(tmp_path):
    def make(name: str) -> Path:
        path = tmp_path / name
        path.write_text(name)
        return path

    return make


def keep(path: Path, value: str, topic: str = "qemu") -> cache.Subject:
    subject = about_program(topic, str(path), "1")
    cache.store(subject, value)
    return subject


def test_what_is_kept_is_found_again(make_program):
    subject = keep(make_program("a"), "known")

    assert cache.load(subject, str) == "known"
    assert cache.load(about_program("qemu", str(make_program("b"))), str) is None


def test_programs_that_are_gone_are_forgotten(make_program, cache_folder):
    gone, there = make_program("gone"), make_program("there")
    keep(gone, "old")
    gone.unlink()
    subject = keep(there, "new")

    assert os.listdir(cache_folder) == [f"{subject.name}.json"]


def test_programs_that_have_changed_are_forgotten(make_program, cache_folder):
    changed, there = make_program("changed"), make_program("there")
    keep(changed, "old")
    changed.write_text("another program")
    subject = keep(there, "new")

    assert os.listdir(cache_folder) == [f"{subject.name}.json"]


def test_programs_that_are_there_are_kept_in_mind(make_program):
    subjects = [keep(make_program(name), name) for name in "abc"]

    assert [cache.load(subject, str) for subject in subjects] == ["a", "b", "c"]


def test_oldest_beyond_the_limit_are_forgotten(make_program, cache_folder):
    subjects = [keep(make_program(f"{number}"), "known") for number in range(MAX_KEPT)]
    for number, subject in enumerate(subjects):
        os.utime(cache_folder / f"{subject.name}.json", (number, number))
    keep(make_program("one more"), "known")

    assert len(os.listdir(cache_folder)) == MAX_KEPT
    assert cache.load(subjects[0], str) is None
    assert cache.load(subjects[1], str) == "known"


def test_nothing_else_in_the_folder_is_touched(make_program, cache_folder):
    other = make_program("other")
    subject = keep(other, "of another topic", topic="kvm")
    other.unlink()
    (cache_folder / "guest").mkdir()
    (cache_folder / "notes.json").write_text("not ours")
    keep(make_program("there"), "new")

    assert {"guest", "notes.json", f"{subject.name}.json"} < set(os.listdir(cache_folder))


def test_what_cannot_be_understood_is_removed(make_program, cache_folder):
    cache_folder.mkdir(mode=0o700)
    (cache_folder / "qemu-00000000.json").write_text("[")
    (cache_folder / "qemu-00000001.json").write_text('{"key": [], "value": 1}')
    subject = keep(make_program("there"), "new")

    assert os.listdir(cache_folder) == [f"{subject.name}.json"]


def test_what_was_written_half_long_ago_is_removed(make_program, cache_folder):
    cache_folder.mkdir(mode=0o700)
    (cache_folder / ".qemu-00000000.1.1").write_text("{")
    os.utime(cache_folder / ".qemu-00000000.1.1", (0, 0))
    (cache_folder / ".qemu-00000000.2.2").write_text("{")
    subject = keep(make_program("there"), "new")

    assert sorted(os.listdir(cache_folder)) == [".qemu-00000000.2.2", f"{subject.name}.json"]


def test_file_that_another_process_removes_meanwhile_is_no_error(make_program, cache_folder, monkeypatch):
    keep(make_program("there"), "known")
    found = os.listdir(cache_folder)
    monkeypatch.setattr(os, "listdir", lambda _: [*found, "qemu-00000000.json"])
    subject = keep(make_program("another"), "new")

    assert cache.load(subject, str) == "new"
