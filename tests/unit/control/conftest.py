"""A VMM thread on the fake engine, its events, and a caller's ends of its channel."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from cloudvmm import api
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.vmm import VmmThread
from cloudvmm.engine.fake import FakeEngine
from cloudvmm.errors import error_chain
from cloudvmm.events.hub import Event
from support.deadline import HOST_S
from support.wait import wait_until

from .peer import Peer

DEADLINE_S = HOST_S


class Caller:
    """Calls commands; `refusal` gives the error chain of one that must fail."""

    def __init__(
        self, engine: FakeEngine, *, no_shutdown: bool = False, state_dir: str | None = None
    ) -> None:
        self.engine = engine
        self.events: list[Event] = []
        self.logged: list[str] = []
        self.requests: list[str] = []  # what is logged of those
        self._changed = threading.Condition()
        self.vmm = VmmThread(
            engine,
            no_shutdown=no_shutdown,
            state_dir=state_dir,
            log=self._log,
        )
        self.vmm.events.subscribe(self._hear)

    def __call__(self, function, *data):
        return function(self.vmm.api_evt, self.vmm.api_sender, *data)

    def refusal(self, function, *data) -> list[str]:
        with pytest.raises(api.ApiError) as caught:
            self(function, *data)
        return error_chain(caught.value)

    def beside(self, function, *data) -> Beside:
        return Beside(lambda: self(function, *data))

    def settled_info(self) -> api.VmInfo:
        """Return `vm.info` once the guest's BARs are in it, which nothing changes any more."""

        def info() -> api.VmInfo | None:
            info = self(api.vm_info)
            return info if info.device_tree["_virtio-pci-__rng"].resources else None

        return wait_until(info, "the BARs in vm.info", timeout_s=DEADLINE_S)

    def names(self) -> list[str]:
        """Return "source/event" of what the reference would tell, apart from what the guest's drivers did."""
        return [name for name in self.all_names() if not name.startswith(("virtio-device/", "vdpa/"))]

    def all_names(self) -> list[str]:
        return [f"{event.source}/{event.event}" for event in self.events if not event.is_ours]

    def wait_for_event(self, name: str, *, count: int = 1) -> None:
        """Wait until "source/event" `name` has come `count` times."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.all_names().count(name) >= count, DEADLINE_S), (
                self.all_names()
            )

    def _log(self, level: str, said: str | Callable[[], str]) -> None:
        text = said if isinstance(said, str) else said()
        is_request = text.startswith("API request event: ")
        (self.requests if is_request else self.logged).append(f"{level}: {text}")

    def _hear(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def close(self) -> None:
        if self.vmm.is_running:
            self.vmm.exit_evt.write()
        assert self.vmm.join(DEADLINE_S)
        self.vmm.close()


class Beside:
    """A call in a thread of its own; `result` waits for it and gives what it returned or raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._result: object = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._call()
        except api.ApiError as error:
            self._result = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> object:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the call was never answered"
        return self._result


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def caller(engine: FakeEngine) -> Iterator[Caller]:
    caller = Caller(engine)
    yield caller
    caller.close()


@pytest.fixture
def other() -> Iterator[Caller]:
    """Another VMM, for a VM that leaves the first."""
    caller = Caller(FakeEngine())
    yield caller
    caller.close()


class Gate:
    """Lets calls of the method `name` of `owner` begin with `on_begin`, and go on once it is opened."""

    def __init__(self, owner, name, on_begin=lambda *_: None) -> None:
        self._method = getattr(owner, name)
        self._on_begin = on_begin
        self._has_begun = threading.Event()
        self._is_open = threading.Event()
        setattr(owner, name, self._call)

    def await_begin(self) -> None:
        assert self._has_begun.wait(DEADLINE_S)

    def open(self) -> None:
        self._is_open.set()

    def _call(self, *args, **options):
        self._on_begin(*args)
        self._has_begun.set()
        assert self._is_open.wait(DEADLINE_S)
        return self._method(*args, **options)


@pytest.fixture
def url(tmp_path) -> str:
    """Where the other VMM can listen for a VM."""
    return f"unix:{tmp_path}/migration"


@pytest.fixture
def peer(url: str) -> Iterator[Peer]:
    peer = Peer(url)
    yield peer
    peer.close()
    peer.cut.close()


@pytest.fixture
def vm_config(tmp_path) -> VmConfig:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"kernel")
    return VmConfig(
        payload=PayloadConfig(kernel=str(kernel)),
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )


@pytest.fixture
def booted(caller: Caller, vm_config: VmConfig) -> Caller:
    caller(api.vm_create, vm_config)
    caller(api.vm_boot)
    return caller
