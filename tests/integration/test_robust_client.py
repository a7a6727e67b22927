"""Four clients do conflicting things at once: each answer is one that some order of the commands gives."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.attack import Held, assert_holds_no_more, bare_config, booted, read_events
from support.deadline import HOST_S
from support.rest import Reply
from support.server import Server
from support.vm import EngineChoice

ServerFactory = Callable[..., Server]

CLIENTS = 4
COMMANDS_EACH = 50

NOT_CREATED = (404, "VM is not created")
NOT_RUNNING = (500, "VM is not running")
EXISTS = (500, "VM is already created")
BAD_TRANSITION = (
    500,
    r"Invalid transition: InvalidStateTransition\((Running|Paused|Created), (Running|Paused)\)",
)
NO_MEANS = (500, ".* comes with a later release.*")
GONE = (500, "The machine is gone")

# What rest.md section 8 allows, over all situations: status, and the innermost text of an error.
ALLOWED: dict[str, list[tuple[int, str | None]]] = {
    "vmm.ping": [(200, None)],
    "vm.info": [(200, None), NOT_CREATED],
    "vm.counters": [(200, None), NOT_RUNNING, GONE],
    "vm.create": [(204, None), EXISTS],
    "vm.boot": [(204, None), (404, "VM config is missing"), EXISTS],
    "vm.pause": [(204, None), NOT_RUNNING, BAD_TRANSITION],
    "vm.resume": [(204, None), NOT_RUNNING, BAD_TRANSITION],
    "vm.shutdown": [(204, None), NOT_RUNNING],
    "vm.reboot": [(204, None), NOT_CREATED],
    "vm.delete": [(204, None)],
    "vm.power-button": [(204, None), NOT_RUNNING],
    "vm.nmi": [(204, None), NOT_RUNNING],
    "vm.coredump": [(204, None), NOT_RUNNING],
    "vm.resize": [(204, None), NOT_CREATED, NO_MEANS],
    "vm.remove-device": [
        NOT_CREATED,
        (404, 'No device with id "nobody" to remove'),
        (404, "Failed to find device corresponding to the given identifier: nobody"),
    ],
}
READS = ("vmm.ping", "vm.info", "vm.counters")
STATES = {
    "vm/booted": ({"off"}, "running"),
    "vm/paused": ({"running"}, "paused"),
    "vm/resumed": ({"paused"}, "running"),
    "vm/rebooted": ({"running", "paused"}, "running"),
    "vm/shutdown": ({"running", "paused"}, "off"),
    "vm/deleted": ({"off"}, "off"),
}


class Client:
    """Sends its commands, one after the other, from a thread of its own."""

    def __init__(self, server: Server, seed: int, config: dict[str, Any], folder: Path) -> None:
        self.answers: list[tuple[str, Reply]] = []
        self.failure: Exception | None = None
        chance = random.Random(seed)
        bodies = {
            "vm.create": lambda number: config,
            "vm.resize": lambda number: {"desired_vcpus": 1},
            "vm.remove-device": lambda number: {"id": "nobody"},
            "vm.coredump": lambda number: {"destination_url": f"file://{folder}/core-{seed}-{number}"},
        }
        names = [chance.choice(list(ALLOWED)) for _ in range(COMMANDS_EACH)]
        self._todo = [
            (name, bodies.get(name, lambda number: None)(number)) for number, name in enumerate(names)
        ]
        self._thread = threading.Thread(target=self._run, args=(server,))
        self._thread.start()

    def join(self) -> None:
        self._thread.join(HOST_S)
        assert not self._thread.is_alive(), f"Still waiting for {self._todo[len(self.answers)]}"
        assert self.failure is None, self.failure

    def _run(self, server: Server) -> None:
        try:
            with server.vmm.connect() as client:
                for name, body in self._todo:
                    reply = client.ask("GET" if name in READS else "PUT", name, body)
                    self.answers.append((name, reply))
        except Exception as error:
            self.failure = error


def is_allowed(name: str, reply: Reply) -> bool:
    for status, pattern in ALLOWED[name]:
        if reply.status == status:
            if pattern is None:
                return True
            if re.fullmatch(
                re.escape(pattern) if "\\" not in pattern and "*" not in pattern else pattern,
                reply.texts()[-1],
            ):
                return True
    return False


def assert_order_is_possible(events: list[str]) -> None:
    """Fail where an event comes in a state in which no order of the commands could have it."""
    state = "off"
    for number, event in enumerate(events):
        if event in STATES:
            before, after = STATES[event]
            assert state in before, f"{event} while {state}, after {events[:number]}"
            state = after


@pytest.mark.parametrize("seed", [1, 2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_conflicting_commands_get_answers_that_some_order_gives(
    fake_engine: EngineChoice, cloudvmm_server: ServerFactory, tmp_path: Path, seed: int
) -> None:
    events = tmp_path / "events"
    server = cloudvmm_server("--event-monitor", f"path={events}")
    config = bare_config(fake_engine, tmp_path)
    booted(server, fake_engine, tmp_path)
    server.vmm.put("vm.delete")
    before = Held(server.pid)
    clients = [Client(server, seed * 100 + number, config, tmp_path) for number in range(CLIENTS)]
    for client in clients:
        client.join()
    answers = [answer for client in clients for answer in client.answers]
    assert len(answers) == CLIENTS * COMMANDS_EACH
    assert [(name, reply.raw) for name, reply in answers if not is_allowed(name, reply)] == []
    told = read_events(events)
    assert_order_is_possible(told)
    done = Counter(name for name, reply in answers if reply.status == 204)
    assert Counter(told)["vm/booted"] == done["vm.boot"] + 1
    assert Counter(told)["vm/rebooted"] == done["vm.reboot"]
    server.vmm.put("vm.delete")
    assert server.vmm.exchange("GET", "vm.info").status == 404
    assert_holds_no_more(server.pid, before)
    booted(server, fake_engine, tmp_path)


def test_commands_of_one_client_are_carried_out_in_its_order(
    fake_engine: EngineChoice, server: Server, tmp_path: Path
) -> None:
    booted(server, fake_engine, tmp_path)
    with server.vmm.second() as other:
        for _ in range(25):
            server.vmm.put("vm.pause")
            assert other.get("vm.info")["state"] == "Paused"
            server.vmm.put("vm.resume")
            assert other.get("vm.info")["state"] == "Running"
