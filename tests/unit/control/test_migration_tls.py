"""Migration over TLS, and over several connections, between two VMMs on the fake engine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cloudvmm import api
from support.certificate import Authority
from support.leak import Holdings
from support.wait import wait_until

from .conftest import DEADLINE_S, Caller
from .test_migration import free_tcp_url, is_running, receive, refusal_of, send

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca") / "ours", HOST, "::1")


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca") / "other", HOST)


def listen(caller: Caller, url: str, **options) -> None:
    caller.answer = caller.beside(api.vm_receive_migration, receive(url, **options))
    caller.wait_for_event("vm/migration-receive-ready")


def assert_stayed(booted: Caller, word: str) -> None:
    """The guest was never stopped, and the log says `word`."""
    booted.wait_for_event("vm/migration-failed")
    assert is_running(booted)
    assert "vm/pausing" not in booted.names()
    wait_until(
        lambda: any(word in line for line in booted.logged), f"{word} in the log", timeout_s=DEADLINE_S
    )


@pytest.mark.parametrize("host", [HOST, "[::1]"])
@pytest.mark.parametrize("connections", [1, 3])
def test_vm_moves_over_tls(booted, other, authority, host, connections):
    url = free_tcp_url(host)
    listen(other, url, tls_dir=authority.tls_dir)
    booted(api.vm_send_migration, send(url, tls_dir=authority.tls_dir, connections=connections))

    assert other.answer.result() is None
    assert other(api.vm_info).state is api.VmState.RUNNING


def test_vm_moves_over_several_connections(booted, other):
    url = free_tcp_url(HOST)
    listen(other, url)
    booted(api.vm_send_migration, send(url, connections=128))
    assert other.answer.result() is None
    assert other(api.vm_info).state is api.VmState.RUNNING


def test_server_of_another_authority_is_refused_before_the_source_stops(
    booted, other, authority, other_authority, tmp_path
):
    url = free_tcp_url(HOST)
    listen(other, url, tls_dir=other_authority.trusting(authority, tmp_path / "mixed"))
    booted(api.vm_send_migration, send(url, tls_dir=authority.tls_dir))

    assert_stayed(booted, "The certificate is not accepted")
    assert "Error setting up a TLS-encrypted connection" in refusal_of(other.answer.result())


def test_client_of_another_authority_is_refused_before_the_source_stops(
    booted, other, authority, other_authority, tmp_path
):
    url = free_tcp_url(HOST)
    listen(other, url, tls_dir=authority.tls_dir)
    booted(api.vm_send_migration, send(url, tls_dir=other_authority.trusting(authority, tmp_path / "mixed")))

    assert_stayed(booted, "The migration failed")
    assert any("The certificate is not accepted" in text for text in refusal_of(other.answer.result()))


def test_server_under_another_name_is_refused(booted, other, other_authority, tmp_path):
    named = Authority(tmp_path / "named", "elsewhere.example")
    url = free_tcp_url(HOST)
    listen(other, url, tls_dir=named.tls_dir)
    booted(api.vm_send_migration, send(url, tls_dir=named.tls_dir))

    assert_stayed(booted, "IP address mismatch")
    assert refusal_of(other.answer.result())


def test_sender_without_tls_is_refused(booted, other, authority):
    url = free_tcp_url(HOST)
    listen(other, url, tls_dir=authority.tls_dir)
    booted(api.vm_send_migration, send(url))

    assert_stayed(booted, "The migration failed")
    assert "Error setting up a TLS-encrypted connection" in refusal_of(other.answer.result())


def test_receiver_without_tls_is_refused(booted, other, authority):
    url = free_tcp_url(HOST)
    listen(other, url)
    booted(api.vm_send_migration, send(url, tls_dir=authority.tls_dir))

    assert_stayed(booted, "Error setting up a TLS-encrypted connection")
    assert refusal_of(other.answer.result())


def test_files_that_are_no_certificates_are_refused_at_once(booted, other, authority, tmp_path):
    folder = Path(authority.trusting(authority, tmp_path / "bad"))
    for name in ("server-key.pem", "client-key.pem"):
        (folder / name).write_text("no key")
    url = free_tcp_url(HOST)

    words = other.refusal(api.vm_receive_migration, receive(url, tls_dir=str(folder)))
    assert words[:3] == [
        "Error receiving migration",
        "Failed to receive migratable component snapshot",
        "Error setting up a TLS-encrypted connection",
    ]
    booted(api.vm_send_migration, send(url, tls_dir=str(folder)))
    assert_stayed(booted, "Error setting up a TLS-encrypted connection")


def test_nothing_is_left_of_a_migration_over_tls(booted, other, authority):
    url = free_tcp_url(HOST)
    other(api.vmm_ping)  # its threads are there then
    booted(api.vmm_ping)
    before = Holdings()
    listen(other, url, tls_dir=authority.tls_dir)
    with socket.create_connection((HOST, int(url.rpartition(":")[2])), timeout=DEADLINE_S) as stranger:
        stranger.sendall(b"CVMg, says a stranger who knows no TLS")
        assert refusal_of(other.answer.result())
    before.assert_nothing_added()
