"""The engine that is loaded when somebody needs it."""

from __future__ import annotations

import threading

from cloudvmm.cli.engine import DeferredEngine
from cloudvmm.engine.fake import FakeEngine
from support.deadline import HOST_S


class Loader:
    def __init__(self):
        self.engines = []
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self):
        assert self.go_on.wait(HOST_S)
        self.engines.append(FakeEngine())
        return self.engines[-1]


def test_engine_is_loaded_once_and_with_the_first_question():
    loader = Loader()
    engine = DeferredEngine(loader)
    assert loader.engines == []
    assert engine.info == FakeEngine().info
    assert engine.info.name == loader.engines[0].info.name
    assert len(loader.engines) == 1


def test_two_that_ask_at_once_get_the_same_engine():
    loader = Loader()
    loader.go_on.clear()
    engine = DeferredEngine(loader)
    threads = [threading.Thread(target=lambda: engine.info) for _ in range(4)]
    for thread in threads:
        thread.start()
    loader.go_on.set()
    for thread in threads:
        thread.join(HOST_S)
    assert len(loader.engines) == 1


def test_abort_does_not_wait_for_an_engine_that_is_being_loaded():
    loader = Loader()
    loader.go_on.clear()
    engine = DeferredEngine(loader)
    asking = threading.Thread(target=lambda: engine.info)
    asking.start()
    engine.abort_build()
    assert loader.engines == []
    loader.go_on.set()
    asking.join(HOST_S)
    assert len(loader.engines) == 1


def test_another_is_an_engine_of_its_own():
    loader = Loader()
    other = DeferredEngine(loader).another()
    assert isinstance(other, FakeEngine)
    assert other is not loader.engines[0]
