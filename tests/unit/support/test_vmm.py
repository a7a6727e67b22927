"""The helper that tests speak to a server with: what it returns, and what it says when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudvmm.api import VmBootError, VmNotCreated
from cloudvmm.http import start_http_path_thread
from support.rest import ScriptedVmm
from support.vmm import Vmm


@pytest.fixture
def script() -> Iterator[ScriptedVmm]:
    script = ScriptedVmm()
    yield script
    script.close()


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def vmm(script: ScriptedVmm, calls: list[str], tmp_path: Path) -> Iterator[Vmm]:
    server = start_http_path_thread(str(tmp_path / "api"), script.event, script.sender)
    vmm = Vmm(str(tmp_path / "api"), on_answer=lambda command, _: calls.append(command), timeout_s=0.5)
    yield vmm
    vmm.close()
    server.close(deadline_s=0)


@pytest.fixture
def no_vm(script: ScriptedVmm) -> None:
    error = VmBootError()
    error.__cause__ = VmNotCreated()
    script.answer("vm.boot", error)


def test_success_gives_the_body(vmm: Vmm, calls: list[str]) -> None:
    assert vmm.get("vmm.ping")["pid"] == 7
    assert vmm.put("vm.boot") is None
    assert calls == ["vmm.ping", "vm.boot"]


def test_expected_error_gives_its_chain(vmm: Vmm, no_vm: None) -> None:
    assert vmm.put("vm.boot", expect=404) == ["Error from API", "The VM could not boot", "VM is not created"]


def test_unexpected_error_fails_with_its_chain(vmm: Vmm, no_vm: None) -> None:
    said = (
        r"PUT vm\.boot: 404 instead of success: Error from API <- The VM could not boot <- VM is not created"
    )
    with pytest.raises(AssertionError, match=said):
        vmm.put("vm.boot")


def test_unexpected_success_fails(vmm: Vmm) -> None:
    with pytest.raises(AssertionError, match=r"PUT vm\.boot: 204 instead of 404"):
        vmm.put("vm.boot", expect=404)


def test_missing_answer_ends_at_the_deadline_and_the_next_call_is_served(
    vmm: Vmm, script: ScriptedVmm
) -> None:
    script.answer("vm.boot", lambda request: None)
    with pytest.raises(TimeoutError):
        vmm.put("vm.boot")
    assert vmm.get("vmm.ping")["pid"] == 7


def test_second_client_is_served_while_the_first_waits(vmm: Vmm, script: ScriptedVmm) -> None:
    script.answer("vm.boot", lambda request: None)
    with vmm.connect() as waiting:
        waiting.send(b"PUT /api/v1/vm.boot HTTP/1.1\r\n\r\n")
        script.await_request("vm.boot")
        with vmm.second() as other:
            assert other.get("vmm.ping")["pid"] == 7
