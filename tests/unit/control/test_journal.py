"""The journal and the state folder's rules."""

from __future__ import annotations

import msgspec
import pytest

from cloudvmm import api
from cloudvmm.control.journal import Journal, StateDirFormat, StateDirInUse
from cloudvmm.engine.fake import FakeEngine

from .conftest import Caller


def entries(state_dir):
    return [msgspec.json.decode(line) for line in (state_dir / "journal").read_bytes().splitlines()]


def test_commands_are_written_with_their_outcome(tmp_path, vm_config):
    caller = Caller(FakeEngine(), state_dir=str(tmp_path / "state"))
    caller(api.vm_create, vm_config)
    caller.refusal(api.vm_create, vm_config)
    caller.close()

    written = [(e["command"], e["phase"], e.get("errors")) for e in entries(tmp_path / "state")]

    assert written[:4] == [
        ("vm.create", "begin", None),
        ("vm.create", "done", None),
        ("vm.create", "begin", None),
        ("vm.create", "failed", ["VM is already created"]),
    ]
    assert written[-1] == ("vmm.shutdown", "done", None)


def test_a_folder_in_use_is_refused(tmp_path):
    journal = Journal(str(tmp_path))

    with pytest.raises(StateDirInUse, match="in use by another running VMM"):
        Journal(str(tmp_path))
    journal.close()
    Journal(str(tmp_path)).close()


def test_a_folder_of_another_format_is_refused(tmp_path):
    (tmp_path / "format").write_text("99\n")

    with pytest.raises(StateDirFormat, match="has format '99'"):
        Journal(str(tmp_path))


def test_what_the_last_vmm_left_unfinished_is_known(tmp_path):
    journal = Journal(str(tmp_path))
    journal.begin("vm.create")
    journal.end("vm.create")
    journal.begin("vm.boot")
    journal.close()
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'{"at":1,"comm')

    again = Journal(str(tmp_path))

    assert again.unfinished == ["vm.boot"]
    again.close()


def test_a_clean_run_clears_what_an_earlier_one_left(tmp_path):
    journal = Journal(str(tmp_path))
    journal.begin("vm.boot")
    journal.close()
    Journal(str(tmp_path)).close()

    again = Journal(str(tmp_path))

    assert again.unfinished == []
    again.close()


def test_an_error_with_a_file_name_that_is_not_utf8_is_written(tmp_path):
    journal = Journal(str(tmp_path))
    journal.end("vm.boot", OSError(2, "No such file", "/k\udcff"))
    journal.close()

    assert "/k?" in entries(tmp_path)[0]["errors"][0]
