"""The calls of the reference's API guide, as its readers type them."""

import shutil
import subprocess

import pytest

from cloudvmm.wire.response import ERROR_HEADER
from support.rest import PONG
from support.traffic import Answer, check_curl

if shutil.which("curl") is None:
    pytest.skip("curl is missing (apt install curl)", allow_module_level=True)

CREATE = """{
    "cpus":{"boot_vcpus": 4, "max_vcpus": 4},
    "payload":{"kernel": "/opt/clh/kernel/vmlinux-virtio-fs-virtio-iommu", "cmdline": "console=ttyS0"},
    "disks":[{"path": "/opt/clh/images/focal-server-cloudimg-amd64.raw"}],
    "rng":{"src": "/dev/urandom"},
    "net":[{"ip":"192.168.10.10", "mask":"255.255.255.0", "mac":"12:34:56:78:90:01"}]
}"""


def curl(socket_path, *arguments):
    """Return what curl prints, and the status code behind it; a single call is held against the document."""
    form = f"\n%{{http_code}} %header{{{ERROR_HEADER}}} %{{content_type}}"
    call = ["curl", "--silent", "--show-error", "--max-time", "10", "--write-out", form]
    done = subprocess.run(
        [*call, "--unix-socket", socket_path, *arguments], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    printed, _, words = done.stdout.rpartition("\n")
    status, code, content_type = words.split(" ", 2)
    if sum(argument.startswith("http:") for argument in arguments) == 1:
        body = printed.partition("\n\n")[2] if "-i" in arguments else printed
        check_curl(arguments, Answer(int(status), content_type or None, code or None, body.encode()))
    return printed, int(status)


def test_create(server, vmm, socket_path):
    assert curl(
        socket_path,
        *("-i", "-X", "PUT", "http://localhost/api/v1/vm.create"),
        *("-H", "Accept: application/json"),
        *("-H", "Content-Type: application/json"),
        *("-d", CREATE),
    ) == ("HTTP/1.1 204 \nServer: Cloud Hypervisor API\nConnection: keep-alive\n\n", 204)
    config = vmm.await_request("vm.create").data
    assert (config.cpus.boot_vcpus, config.net[0].mac) == (4, "12:34:56:78:90:01")


@pytest.mark.parametrize(
    "name", ["vm.boot", "vm.reboot", "vm.shutdown", "vm.pause", "vm.resume", "vm.delete"]
)
def test_action(server, socket_path, name):
    assert curl(socket_path, "-X", "PUT", f"http://localhost/api/v1/{name}") == ("", 204)


def test_shut_the_vmm_down(server, socket_path):
    assert curl(socket_path, "-X", "PUT", "http://localhost/api/v1/vmm.shutdown") == ("", 200)


def test_info(server, socket_path):
    arguments = ("-X", "GET", "http://localhost/api/v1/vm.info", "-H", "Accept: application/json")
    body, status = curl(socket_path, *arguments)
    assert (status, '"state":"Created"' in body) == (200, True)


def test_ping(server, socket_path):
    body, status = curl(socket_path, "http://localhost/api/v1/vmm.ping")
    assert (status, f'"version":"{PONG.version}"' in body) == (200, True)


def test_two_calls_on_one_connection(server, socket_path):
    url = "http://localhost/api/v1/vmm.ping"
    body, status = curl(socket_path, url, url)
    assert (status, body.count('"pid":7')) == (200, 2)


def test_large_body_for_which_curl_asks_leave(server, vmm, socket_path, tmp_path):
    request = tmp_path / "request.json"
    request.write_text('{"id":"' + "d" * (3 << 20) + '"}')
    arguments = ("-X", "PUT", "-H", "Expect: 100-continue", "--data-binary", f"@{request}")
    assert curl(socket_path, *arguments, "http://localhost/api/v1/vm.remove-device") == ("", 204)
    assert len(vmm.await_request("vm.remove-device").data.id) == 3 << 20


@pytest.mark.parametrize("header", ["Expect: 100-continue", "Expect:"])
def test_too_large_a_body_is_refused_before_or_after_it_is_sent(server, socket_path, tmp_path, header):
    request = tmp_path / "request.json"
    request.write_bytes(b"x" * (5 << 20))
    arguments = ("-X", "PUT", "-H", header, "--data-binary", f"@{request}")
    body, status = curl(socket_path, *arguments, "http://localhost/api/v1/vm.create")
    assert (status, "larger than the limit of 4194304" in body) == (400, True)


def test_post_is_refused_by_the_library(server, socket_path):
    body, status = curl(socket_path, "-d", "{}", "http://localhost/api/v1/vm.create")
    assert (status, body.startswith('{ "error": "Invalid HTTP Method')) == (400, True)
