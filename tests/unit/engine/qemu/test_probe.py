"""Which verdicts on KVM are kept, with scripts in the place of QEMU."""

from __future__ import annotations

import errno
import os

import pytest

from cloudvmm.engine.qemu import probe
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.probe import judge_kvm
from support.deadline import HOST_S

pytestmark = pytest.mark.usefixtures("cache_folder")
DEVICE = "/dev/null"  # can be opened; what is run there never looks at it


@pytest.fixture(autouse=True)
def patient_start(monkeypatch):
    monkeypatch.setattr(probe, "START_TIMEOUT_S", HOST_S)


@pytest.fixture
def make_facts(tmp_path):
    def make(script: str) -> QemuFacts:
        path = tmp_path / "qemu-system-x86_64"
        path.write_text(f"#!/bin/sh\necho run >>{tmp_path}/runs\n{script}\n")
        path.chmod(0o755)
        return QemuFacts(binary=str(path), version=(10, 0, 2))

    return make


def runs(tmp_path) -> int:
    return (tmp_path / "runs").read_text().count("run")


@pytest.mark.parametrize(
    ("script", "usable"),
    [("exit 99", True), ("echo 'failed to initialize kvm: Function not implemented' >&2; exit 1", False)],
)
def test_verdict_of_qemu_is_kept(make_facts, tmp_path, script, usable):
    facts = make_facts(script)
    verdicts = [judge_kvm(facts, kvm_device=DEVICE) for _ in range(2)]

    assert [verdict.usable for verdict in verdicts] == [usable, usable]
    assert verdicts[0] == verdicts[1]
    assert runs(tmp_path) == 1


@pytest.mark.parametrize(
    "script",
    [
        "kill -9 $$",
        "echo 'ioctl(KVM_CREATE_VM) failed: Cannot allocate memory' >&2; exit 1",
    ],
)
def test_what_a_busy_host_does_is_not_kept(make_facts, tmp_path, script):
    facts = make_facts(script)

    assert [judge_kvm(facts, kvm_device=DEVICE).usable for _ in range(2)] == [False, False]
    assert runs(tmp_path) == 2


def test_silence_of_qemu_is_not_kept(make_facts, tmp_path, monkeypatch):
    facts = make_facts(f"[ -e {tmp_path}/speak ] && exit 99; exec sleep 300")
    with monkeypatch.context() as patch:
        patch.setattr(probe, "START_TIMEOUT_S", 0.2)
        assert not judge_kvm(facts, kvm_device=DEVICE).usable

    (tmp_path / "speak").touch()
    assert judge_kvm(facts, kvm_device=DEVICE).usable


def test_want_of_descriptors_is_not_kept(make_facts, tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    facts = make_facts("exit 99")
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", refuse)
        verdict = judge_kvm(facts, kvm_device=DEVICE)

    assert not verdict.usable
    assert "Too many open files" in verdict.reason
    assert judge_kvm(facts, kvm_device=DEVICE).usable
