"""The other side of a migration, played by hand."""

from __future__ import annotations

import os
import socket

import msgspec

from cloudvmm.config import form
from cloudvmm.config.vm import VmConfig
from cloudvmm.migration.address import UnixAddress, parse_address
from cloudvmm.migration.cut import Cut
from cloudvmm.migration.link import connect
from cloudvmm.migration.listener import Listener, greet
from cloudvmm.migration.message import Accept, Offer, Welcome


def record(**changes) -> msgspec.Raw:
    """What a VMM knows about a VM with an entropy source alone."""
    plain = {
        "slots": {"__rng": 1},
        "virtio": ["__rng"],
        "kinds": {"__rng": "rng"},
        "trapped": [],
        "given_ids": [],
        "counter": 0,
        "vcpus": {"present": 1},
        "ram": {
            "boot_bytes": 512 << 20,
            "modules": [],
            "room_bytes": 0,
            "has_user_zones": False,
            "zones": {},
        },
        "guest_ram": {},
    }
    return msgspec.Raw(msgspec.json.encode(plain | changes))


class Peer:
    """The other side, by hand. As destination it listens at `url`, as source it connects to it."""

    def __init__(self, url: str) -> None:
        self.cut = Cut()
        self.url = url
        self.listener: Listener | None = None
        self.control = None
        self.states: list = []

    def listen(self) -> None:
        self.listener = Listener(UnixAddress(self.url.removeprefix("unix:")), self.cut)

    def accept(self, *, is_postcopy: bool = False) -> Offer:
        """Take the connection and the offer, and accept it."""
        self.control = self.listener.accept_sender()
        greet(self.control)
        offer = self.control.receive(Offer)
        self.control.send(Accept(token="t", is_postcopy=is_postcopy))
        return offer

    def take_state(self) -> None:
        (link,) = self.listener.accept_states("t", self.control, 1)
        self.states.append(link)
        sock = socket.socket(fileno=os.dup(link.fileno()))
        with sock:
            size = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), "big")
            assert len(sock.recv(size, socket.MSG_WAITALL)) == size
            sock.sendall(b"\x06")

    def connect(self, vm_config: VmConfig, **changes) -> None:
        """Connect and offer `vm_config`."""
        self.control = connect(parse_address(self.url), "control", self.cut)
        self.control.receive(Welcome)
        offer = Offer(
            config=msgspec.Raw(form.encode(vm_config)),
            vm=record(),
            engine="fake",
            engine_version="1",
        )
        self.control.send(msgspec.structs.replace(offer, **changes))

    def send_state(self, config: VmConfig) -> None:
        token = self.control.receive(Accept).token
        link = connect(parse_address(self.url), "state", self.cut, token=token)
        self.states.append(link)
        state = {
            "engine": "fake",
            "tick_ms": 7,
            "seen": {},
            "unseen": [],
            "asked": [],
            "hardware": {"slots": {"__rng": 1}, "ram_bytes": config.memory.size, "vcpus": 1},
        }
        raw = msgspec.json.encode(state)
        with socket.socket(fileno=os.dup(link.fileno())) as sock:
            sock.sendall(len(raw).to_bytes(4, "big") + raw)

    def close(self) -> None:
        for link in (self.control, self.listener, *self.states):
            if link is not None:
                link.close()
        self.control = self.listener = None
        self.states = []
