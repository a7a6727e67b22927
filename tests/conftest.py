"""The ladder of the integration and conformance tests: server, vmm, vm_created, vm_booted.

A test that must hold on both engines asks for `any_engine`; all others run on QEMU. Contract and unit tests
have ladders of their own. `vm` is the guest that a module's `shared_vm` boots for all its tests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.booted import Booted
from support.latency import LatencyLog
from support.server import Server
from support.shared import FAILED, Shared
from support.vm import EngineChoice, Guest, choose_engine, small_config
from support.vmm import Vmm
from support.watch import CLOCK

LATENCY = pytest.StashKey[LatencyLog]()
ServerFactory = Callable[..., Server]


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get("CLOUDVMM_LONG"):
        _draw_the_same_examples()
    config.stash[LATENCY] = LatencyLog()
    CLOCK.start()
    config.stash[FAILED] = set()


def _draw_the_same_examples() -> None:
    """A run that is not the long one answers for the change under test alone."""
    with contextlib.suppress(ImportError):  # the machines of the lanes have no hypothesis, nor need it
        import hypothesis

        slow = [hypothesis.HealthCheck.too_slow]  # says how busy the machine is
        hypothesis.settings.register_profile(
            "same each time", derandomize=True, deadline=None, suppress_health_check=slow
        )
        hypothesis.settings.load_profile("same each time")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.config.stash[FAILED].add(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand over what this worker has measured, where the tests are spread over several (pytest-xdist)."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["latency"] = session.config.stash[LATENCY].calls()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LATENCY].add(getattr(node, "workeroutput", {}).get("latency", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash[LATENCY].report():
        terminalreporter.section("API calls: how long they took")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(params=["fake", pytest.param("qemu", marks=pytest.mark.qemu)])
def any_engine(request: pytest.FixtureRequest) -> EngineChoice:
    """Each engine in turn."""
    return choose_engine(request.param)


@pytest.fixture
def fake_engine() -> EngineChoice:
    """The fake engine, for tests of what stands before any engine."""
    return choose_engine("fake")


@pytest.fixture
def engine_choice(request: pytest.FixtureRequest) -> EngineChoice:
    """The engine that the test asked for by `any_engine` or `fake_engine`; QEMU where it did not."""
    for name in ("any_engine", "fake_engine"):
        if name in request.fixturenames:
            return request.getfixturevalue(name)
    return choose_engine("qemu")


@pytest.fixture
def latency(pytestconfig: pytest.Config) -> LatencyLog:
    """What the report at the end of the run tells from."""
    return pytestconfig.stash[LATENCY]


@pytest.fixture
def cloudvmm_server(
    engine_choice: EngineChoice, tmp_path: Path, pytestconfig: pytest.Config
) -> Iterator[ServerFactory]:
    """Start servers: `cloudvmm_server("--flag", ..., ready=True)`. Each is ended and checked after the test.

    `engine=False` leaves the flags of the engine out, `ready=False` returns before it answers; see `Server`
    for the rest.
    """
    log = pytestconfig.stash[LATENCY]
    servers: list[Server] = []

    def record(command: str, elapsed_s: float) -> None:
        log.record(engine_choice.name, command, elapsed_s)

    def start(*flags: str, engine: bool = True, ready: bool = True, **options: Any) -> Server:
        folder = tmp_path / f"server{len(servers)}"
        engine_flags: Sequence[str] = engine_choice.flags if engine else ()
        servers.append(Server(folder, [*engine_flags, *flags], on_answer=record, **options))
        if ready:
            servers[-1].wait_ready()
        return servers[-1]

    yield start
    with contextlib.ExitStack() as checks:  # each is checked, also when an earlier check fails
        for server in servers:
            checks.callback(server.check_end)


@pytest.fixture
def server(cloudvmm_server: ServerFactory) -> Server:
    """A server without a VM."""
    return cloudvmm_server()


@pytest.fixture
def vmm(server: Server) -> Vmm:
    """A client of `server`."""
    return server.vmm


@pytest.fixture
def vm_config(engine_choice: EngineChoice, tmp_path: Path) -> dict[str, Any]:
    """The JSON form of a small VM, for the test to change before it asks for `vm_created`'s successors."""
    return small_config(engine_choice, tmp_path)


@pytest.fixture
def vm_created(vmm: Vmm, vm_config: dict[str, Any]) -> Vmm:
    """A client of a server that has a config and runs nothing."""
    vmm.put("vm.create", vm_config)
    return vmm


@pytest.fixture
def guest(vm_created: Vmm, engine_choice: EngineChoice) -> Iterator[Guest]:
    """The ends of the consoles of the VM of `vm_created`."""
    guest = Guest(vm_created, engine_choice)
    yield guest
    guest.close()


@pytest.fixture
def vm_booted(vm_created: Vmm, guest: Guest) -> Vmm:
    """A client of a server whose guest has come up; ask for `guest` too to talk to it."""
    vm_created.put("vm.boot")
    guest.wait_ready()
    return vm_created


@pytest.fixture
def vm(shared_vm: Shared[Booted], request: pytest.FixtureRequest) -> Booted:
    """The guest of the module's `shared_vm`, which is another one after a test that failed."""
    return shared_vm.lend(request)
