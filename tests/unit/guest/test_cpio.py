"""The initramfs archive, read back by an independent reader."""

import shutil
import stat
import subprocess

import pytest

from cloudvmm.guest.cpio import write_cpio
from cloudvmm.guest.tree import character_device, folder, regular, symlink


def parse(archive: bytes) -> list[tuple[str, dict[str, int], bytes]]:
    """Read a newc archive by its definition, field by field."""
    names = ["ino", "mode", "uid", "gid", "nlink", "mtime", "filesize", "devmajor", "devminor"]
    names += ["rdevmajor", "rdevminor", "namesize", "check"]
    members, at = [], 0
    while True:
        assert archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        fields = dict(zip(names, numbers, strict=True))
        name = archive[at + 110 : at + 110 + fields["namesize"] - 1].decode()
        start = (at + 110 + fields["namesize"] + 3) & ~3
        content = archive[start : start + fields["filesize"]]
        at = (start + fields["filesize"] + 3) & ~3
        if name == "TRAILER!!!":
            return members
        members.append((name, fields, content))


def test_members_keep_their_names_modes_and_contents_in_order():
    entries = [folder("bin"), regular("bin/a", b"hello", executable=True), symlink("bin/b", "a")]

    members = parse(write_cpio(entries))

    assert [(name, fields["mode"], content) for name, fields, content in members] == [
        ("bin", stat.S_IFDIR | 0o755, b""),
        ("bin/a", stat.S_IFREG | 0o755, b"hello"),
        ("bin/b", stat.S_IFLNK | 0o777, b"a"),
    ]


def test_device_node_carries_its_numbers_and_belongs_to_root():
    ((_, fields, content),) = parse(write_cpio([character_device("dev/console", 5, 1)]))

    assert stat.S_ISCHR(fields["mode"])
    assert (fields["rdevmajor"], fields["rdevminor"], fields["uid"], fields["gid"]) == (5, 1, 0, 0)
    assert content == b""


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 511, 512, 513])
def test_content_of_any_length_is_followed_by_a_readable_member(size):
    archive = write_cpio([regular("x", b"z" * size), regular("after", b"!")])

    assert [(name, len(content)) for name, _, content in parse(archive)] == [("x", size), ("after", 1)]
    assert len(archive) % 512 == 0


def test_same_entries_give_the_same_bytes():
    entries = [folder("a"), regular("a/b", b"c")]

    assert write_cpio(entries) == write_cpio(entries)


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_cpio_program_lists_the_members():
    archive = write_cpio([folder("etc"), regular("etc/fstab", b"proc\n")])

    listing = subprocess.run(["cpio", "-it", "--quiet"], input=archive, capture_output=True, check=True)

    assert listing.stdout.split() == [b"etc", b"etc/fstab"]
