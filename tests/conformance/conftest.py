"""A real server before a scripted VMM thread; and `bench`, a whole program per engine."""

import pytest

from cloudvmm.http import start_http_path_thread
from support.bench import Bench
from support.leak import Holdings
from support.rest import RestClient, ScriptedVmm
from support.vm import choose_engine


@pytest.fixture
def vmm():
    holdings = Holdings()
    scripted = ScriptedVmm()
    yield scripted
    scripted.close()
    holdings.assert_nothing_added()


@pytest.fixture
def socket_path(tmp_path):
    return str(tmp_path / "api.sock")


@pytest.fixture
def server(vmm, socket_path):
    running = start_http_path_thread(socket_path, vmm.event, vmm.sender)
    yield running
    running.close(deadline_s=2.0)


@pytest.fixture
def client(server, socket_path):
    with RestClient(socket_path) as connected:
        yield connected


@pytest.fixture(scope="module", params=["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def bench(request, tmp_path_factory):
    """One server for a whole module, on each engine in turn."""
    bench = Bench(choose_engine(request.param), tmp_path_factory.mktemp(request.param))
    yield bench
    bench.close()
