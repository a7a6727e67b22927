"""Fuzz the files that another process of ours wrote, or somebody else put there in their place.

A snapshot's config.json and state.json, what an engine keeps beside them, a state folder's journal and the
list of a daemon. What must hold: each gives a value, or the error that its reader is documented to raise; the
configuration of a snapshot is the same once it was written and read again; a journal is read to its end.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import zlib
from collections.abc import Hashable
from pathlib import Path

import msgspec

from cloudvmm.config import form
from cloudvmm.config.error import DecodeError, ValidationError
from cloudvmm.config.override import override
from cloudvmm.config.rule import validate
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.error import BadRecord
from cloudvmm.control.journal import Journal
from cloudvmm.control.ledger import LedgerFormat, LedgerInvalid, data_of, is_there, read_ledger
from cloudvmm.control.record import decode_record
from cloudvmm.daemon.registry import DaemonListBroken, Registry
from cloudvmm.engine.base import SavedIn, StateError
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.engine.fake import state as fake_state
from cloudvmm.engine.qemu import keepsake
from cloudvmm.engine.qemu.keepsake import KeptBacking
from cloudvmm.engine.qemu.saved import MACHINE_FILE, read_machine
from cloudvmm.snapshot.error import SnapshotError
from cloudvmm.snapshot.folder import CONFIG_FILE, STATE_FILE, check_files, read_file
from cloudvmm.snapshot.state import decode_state, encode_state
from json_tree import mutate_json
from named import named_target, words_of
from runner import main

_HOME = tempfile.TemporaryDirectory(prefix="fuzz-")
_FOLDER = Path(_HOME.name)
_INFO = FakeEngine().info
NAMES = [
    *("format", "checksum", "state", "program", "engine", "name", "version", "vm", "device_tree", "files"),
    *("size_bytes", "crc32", "frozen_disks", "path", "image_type", "slots", "virtio", "kinds", "trapped"),
    *("given_ids", "counter", "vcpus", "ram", "guest_ram", "architecture", "qemu", "accelerator", "cpu"),
    *("is_ram_apart", "pieces", "checksums", "file", "size", "at", "command", "phase", "errors", "vmms"),
    *("tick_ms", "seen", "unseen", "asked", "hardware", "active", "disks", "payload", "memory", "net"),
]


def _config(raw: bytes) -> Hashable:
    (_FOLDER / CONFIG_FILE).write_bytes(raw)
    try:
        value = form.decode_saved(read_file(str(_FOLDER), CONFIG_FILE), VmConfig)
    except (SnapshotError, DecodeError) as error:
        return words_of(error)
    again = form.encode(value)
    assert form.decode_saved(again, VmConfig) == value, "the second time it reads otherwise"
    patched = msgspec.json.encode(override(msgspec.json.decode(raw), {"console": {"mode": "Off"}}))
    assert form.decode_saved(patched, VmConfig).console.mode.value == "Off"
    try:
        validate(value)
    except ValidationError as error:
        return words_of(error)
    return "holds"


def _state(raw: bytes) -> Hashable:
    (_FOLDER / STATE_FILE).write_bytes(raw)
    try:
        state = decode_state(read_file(str(_FOLDER), STATE_FILE))
        assert decode_state(encode_state(state)) == state
        check_files(str(_FOLDER), state.files)
        record = decode_record(state.vm)
    except (SnapshotError, BadRecord) as error:
        return words_of(error)
    record.numbering(_INFO)
    return len(record.slots), len(state.frozen_disks)


def _sealed_state(raw: bytes) -> Hashable:
    """As `_state`, with a checksum that is right."""
    try:
        state = msgspec.json.encode(json.loads(raw))
    except (ValueError, RecursionError):
        return None
    return _state(b'{"format":2,"checksum":%d,"state":%s}' % (zlib.crc32(state), state))


def _machine(raw: bytes) -> Hashable:
    (_FOLDER / MACHINE_FILE).write_bytes(raw)
    try:
        machine = read_machine(SavedIn(str(_FOLDER), is_on_demand=False, has_prefault=False))
    except StateError as error:
        return words_of(error)
    return machine.is_ram_apart, len(machine.pieces)


def _fake(raw: bytes) -> Hashable:
    (_FOLDER / fake_state.FILE_NAME).write_bytes(raw)
    try:
        state = fake_state._load(str(_FOLDER))
    except StateError as error:
        return words_of(error)
    return len(state.asked), len(state.unseen)


def _journal(raw: bytes) -> Hashable:
    folder = _FOLDER / "state-dir"
    folder.mkdir(exist_ok=True)
    (folder / "journal").write_bytes(raw)
    journal = Journal(str(folder))
    try:
        journal.begin("vm.boot")
        journal.end("vm.boot")
        assert (folder / "journal").read_bytes().count(b"\n") == 2, "the old lines are in the new journal"
        return tuple(journal.unfinished[:4])
    finally:
        journal.close()


def _ledger(raw: bytes) -> Hashable:
    """What a VMM wrote down for the one after it."""
    (_FOLDER / "vm").write_bytes(raw)
    try:
        ledger = read_ledger(str(_FOLDER))
    except (LedgerInvalid, LedgerFormat) as error:
        return words_of(error)
    assert ledger is not None
    try:
        vm_config = (
            form.decode_saved(bytes(ledger.vm_config), VmConfig) if is_there(ledger.vm_config) else None
        )
        record = decode_record(ledger.record) if is_there(ledger.record) else None
        request = None if ledger.under_way is None else data_of(ledger.under_way)
    except (DecodeError, BadRecord) as error:
        return words_of(error)
    return vm_config is None, record is None, request and request[0].name


def _keepsake(raw: bytes) -> Hashable:
    """What a manager left of its QEMU."""
    (_FOLDER / "machine").write_bytes(raw)
    try:
        kept = keepsake.read(str(_FOLDER))
        assert kept is not None
        backings = [*kept.rams.values(), *kept.modules, *kept.zones.values()]
        return [type(keepsake.restore(each)).__name__ for each in backings].count("RamBacking")
    except keepsake.KeepsakeInvalid as error:
        return words_of(error)


def _backing(raw: bytes) -> Hashable:
    """The first line is its kind."""
    kind, _, value = raw.partition(b"\n")
    name = kind.decode(errors="replace")
    try:
        kept = msgspec.json.decode(
            msgspec.json.encode({"kind": name, "value": msgspec.Raw(value)}), type=KeptBacking
        )
    except form.MALFORMED:
        return None
    try:
        return type(keepsake.restore(kept)).__name__
    except keepsake.KeepsakeInvalid as error:
        return name, words_of(error)


def _list(raw: bytes) -> Hashable:
    folder = _FOLDER / "daemon"
    registry = Registry(str(folder))
    try:
        (folder / "vmms.json").write_bytes(raw)
        return len(registry.read())
    except DaemonListBroken as error:
        return words_of(error)
    finally:
        registry.close()


def _format(raw: bytes) -> Hashable:
    """The label on a state folder."""
    folder = _FOLDER / "labelled"
    folder.mkdir(exist_ok=True)
    (folder / "format").write_bytes(raw)
    try:
        Journal(str(folder)).close()
    except Exception as error:
        assert type(error).__name__ == "StateDirFormat", error
        return words_of(error)
    return os.path.getsize(folder / "format")


def _mutate(raw: bytes, noise: random.Random) -> bytes:
    lines = raw.split(b"\n")
    at = noise.randrange(len(lines))
    lines[at] = mutate_json(lines[at], noise, NAMES)
    return b"\n".join(lines)


TARGET = named_target(
    "saved_files",
    {
        "config": _config,
        "state": _state,
        "sealed-state": _sealed_state,
        "machine": _machine,
        "fake": _fake,
        "journal": _journal,
        "ledger": _ledger,
        "keepsake": _keepsake,
        "backing": _backing,
        "list": _list,
        "format": _format,
    },
    words=tuple(f'"{name}":'.encode() for name in NAMES),
    mutate=_mutate,
    share=0.03,
)

if __name__ == "__main__":
    main(TARGET)
