"""Finding QEMU and what it says about itself, with scripts in its place."""

from __future__ import annotations

import os
import zlib

import msgspec
import pytest

from cloudvmm.engine.qemu.binary import (
    BinaryNotFound,
    BinaryTooOld,
    BinaryUnusable,
    find_binary,
    learn_facts,
    parse_devices,
    parse_machines,
    parse_version,
)
from support.watch import Watch

pytestmark = pytest.mark.usefixtures("cache_folder")
SOMEBODY = 65534
SCRIPT = """#!/bin/sh
echo "$1" >>{asked}
case $1 in
-version) echo "QEMU emulator version {version} (Debian 1:{version})" ;;
-L) echo {folder} ;;
-machine) printf 'Supported machines are:\\npc    Standard PC (alias of pc-i440fx-7.2)\\n' ;;
-device) printf 'Storage devices:\\nname "virtio-blk-pci", bus PCI, alias "virtio-blk"\\n' ;;
esac
"""


@pytest.fixture
def asked(tmp_path):
    """The file in which a made-up QEMU notes each question."""
    return tmp_path / "asked"


@pytest.fixture
def make_qemu(tmp_path, asked):
    def make(version: str = "7.2.22", script: str = SCRIPT) -> str:
        path = tmp_path / "qemu-system-x86_64"
        path.write_text(script.format(asked=asked, version=version, folder=tmp_path))
        path.chmod(0o755)
        return str(path)

    return make


def test_binary_given_by_path_is_taken(make_qemu):
    assert find_binary(make_qemu()) == make_qemu()


def test_first_binary_on_the_search_path_is_taken(make_qemu, tmp_path):
    binary = make_qemu()

    assert find_binary(None, search_path=f"/nowhere:{tmp_path}") == binary


def test_no_binary_on_the_search_path_names_the_package():
    with pytest.raises(BinaryNotFound, match="in the package qemu-system-x86$"):
        find_binary(None, search_path="/nowhere")


def test_path_that_leads_nowhere_is_named(tmp_path):
    with pytest.raises(BinaryNotFound, match="There is no program at /nowhere/qemu"):
        find_binary("/nowhere/qemu")
    with pytest.raises(BinaryNotFound):
        find_binary(str(tmp_path))


def test_facts_are_asked_once_per_file(make_qemu, asked):
    binary = make_qemu()
    facts = learn_facts(binary)
    questions = asked.read_text()

    assert (facts.version, facts.devices, facts.machines) == ((7, 2, 22), {"virtio-blk-pci"}, {"pc"})
    assert facts.has_device("virtio-blk-pci")
    assert learn_facts(binary) == facts
    assert asked.read_text() == questions


def test_facts_are_asked_again_after_an_upgrade(make_qemu):
    learn_facts(make_qemu("7.2.1"))

    assert learn_facts(make_qemu("10.0.2")).version == (10, 0, 2)


def test_firmware_is_found_where_qemu_looks(make_qemu, tmp_path):
    (tmp_path / "qboot.rom").write_bytes(b"rom")
    facts = learn_facts(make_qemu())

    assert facts.qboot_path == str(tmp_path / "qboot.rom")
    assert facts.seabios_path is None


def test_firmware_that_was_removed_is_looked_for_again(make_qemu, tmp_path):
    (tmp_path / "qboot.rom").write_bytes(b"rom")
    binary = make_qemu()
    learn_facts(binary)
    (tmp_path / "qboot.rom").unlink()

    assert learn_facts(binary).qboot_path is None


def test_older_than_the_minimum_is_refused(make_qemu):
    with pytest.raises(BinaryTooOld, match="is QEMU 7.1.0; 7.2 or newer is needed"):
        learn_facts(make_qemu("7.1.0"))


@pytest.mark.parametrize("script", ["#!/bin/sh\necho something else\n", "#!/bin/sh\nexit 1\n", "no program"])
def test_what_is_no_qemu_is_refused(make_qemu, script):
    with pytest.raises(BinaryUnusable):
        learn_facts(make_qemu(script=script))


def test_all_answers_together_have_one_deadline(make_qemu, monkeypatch):
    monkeypatch.setattr("cloudvmm.engine.qemu.binary._ANSWERS_TIMEOUT_S", 1.0)
    slow = SCRIPT.replace("case", "sleep 0.7\ncase", 1)
    with Watch() as watch, pytest.raises(BinaryUnusable, match="does not answer in time"):
        learn_facts(make_qemu(script=slow))

    assert watch.elapsed_s < 1.4


def test_cache_that_cannot_be_written_does_no_harm(make_qemu, monkeypatch):
    monkeypatch.setenv("CLOUDVMM_CACHE", "/dev/null/cache")

    assert learn_facts(make_qemu()).version == (7, 2, 22)


@pytest.mark.parametrize("garbage", [b'{"key": [', b'{"key": ["\xff\xfe', b'{"a":' + b"[" * 100000, b""])
def test_garbage_in_the_cache_is_as_nothing(make_qemu, cache_folder, garbage):
    binary = make_qemu()
    facts = learn_facts(binary)
    for name in os.listdir(cache_folder):
        (cache_folder / name).write_bytes(garbage)

    assert learn_facts(binary) == facts


def test_binary_whose_path_is_no_utf8_is_asked_each_time(make_qemu, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(folder)
    os.symlink(make_qemu(), f"{folder}/qemu")

    assert learn_facts(f"{folder}/qemu").version == (7, 2, 22)


def test_folder_and_files_are_the_owners_alone(make_qemu, cache_folder):
    learn_facts(make_qemu())
    (path,) = cache_folder.iterdir()

    assert cache_folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def make_writable_by_others(folder, path):
    path.chmod(0o622)


def make_writable_by_the_group(folder, path):
    path.chmod(0o660)


def make_folder_writable_by_others(folder, path):
    folder.chmod(0o777)


def give_file_away(folder, path):
    os.chown(path, SOMEBODY, SOMEBODY)


def give_folder_away(folder, path):
    os.chown(folder, SOMEBODY, SOMEBODY)


def replace_by_a_link(folder, path):
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


@pytest.mark.skipif(os.geteuid() != 0, reason="Files are given to another user")
@pytest.mark.parametrize(
    "spoil",
    [
        make_writable_by_others,
        make_writable_by_the_group,
        make_folder_writable_by_others,
        give_file_away,
        give_folder_away,
        replace_by_a_link,
    ],
)
def test_what_somebody_else_could_have_written_is_not_believed(make_qemu, cache_folder, asked, spoil):
    binary = make_qemu()
    learn_facts(binary)
    questions = asked.read_text()
    spoil(cache_folder, *cache_folder.iterdir())
    learn_facts(binary)

    assert asked.read_text() == 2 * questions


def test_binary_is_never_taken_from_the_cache(make_qemu, cache_folder):
    binary = make_qemu()
    facts = learn_facts(binary)
    (path,) = cache_folder.iterdir()
    entry = msgspec.json.decode(path.read_bytes())
    entry["value"]["binary"] = "/evil/qemu"
    path.write_bytes(msgspec.json.encode(entry))

    assert learn_facts(binary) == facts


def test_link_in_place_of_the_scratch_file_is_not_followed(make_qemu, cache_folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    cache_folder.mkdir(mode=0o700)
    binary = make_qemu()
    subject = f"qemu-{zlib.crc32(binary.encode()):08x}"
    (cache_folder / f".{subject}.{os.getpid()}").symlink_to(victim)
    learn_facts(binary)

    assert victim.read_bytes() == b"precious"


def test_home_folder_is_used_where_nothing_else_is_named(make_qemu, monkeypatch, tmp_path):
    monkeypatch.delenv("CLOUDVMM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    learn_facts(make_qemu())

    assert len(os.listdir(tmp_path / ".cache" / "cloudvmm")) == 1


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright", (10, 0, 2)),
        ("QEMU emulator version 7.2.22", (7, 2, 22)),
        ("QEMU emulator version ", None),
        ("QEMU emulator version 7.2", None),
        ("qemu-img version 7.2.22", None),
        ("", None),
    ],
)
def test_version(text, version):
    assert parse_version(text) == version


def test_devices_are_the_quoted_names():
    text = 'Storage devices:\nname "nvme", bus PCI, desc "NVM"\nname "floppy"\n\nUSB devices:\n'

    assert parse_devices(text) == {"nvme", "floppy"}


def test_deprecated_machines_are_left_out():
    text = "Supported machines are:\npc   PC (alias of pc-i440fx-10.0)\npc-i440fx-2.4   PC (deprecated)\n"

    assert parse_machines(text) == {"pc"}
    assert parse_machines("") == frozenset()
