"""Writing down what a machine that outlives its manager leaves: see `keepsake.py` for what that is.

It is written whenever it may have changed, and before QEMU is told to make something or to ask it back: so
what QEMU has is never ahead of what is written by more than one addition, whose undoing is written, too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import msgspec

from cloudvmm.config import form
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.pci import PciDevice
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import EngineError
from cloudvmm.engine.qemu import keepsake
from cloudvmm.engine.qemu.hotplug import NewDevice, fdsets_of
from cloudvmm.engine.qemu.keepsake import Coming, Keepsake, KeptBacking, NotKept, Place
from cloudvmm.engine.qemu.memory import RamBacking
from cloudvmm.engine.qemu.parts import remains, steps


class Keeper:
    """Writes into `state_dir` what `describe` gives; nothing where that is None. Any thread."""

    def __init__(self, state_dir: str | None, describe: Callable[[], Keepsake]) -> None:
        self._state_dir = state_dir
        self._describe = describe
        self._lock = threading.Lock()
        self._is_over = False
        self._written = b""
        self._coming: Coming | None = None
        self._coming_module: KeptBacking | None = None
        self._module_places: dict[int, Place] = {}

    def keep(self) -> None:
        """A fault costs what would be written, and nothing else: the machine goes on."""
        with contextlib.suppress(EngineError):
            self.keep_surely()

    def keep_surely(self) -> None:
        """:raises EngineError: it cannot be written."""
        if self._state_dir is None:
            return
        with self._lock:
            if self._is_over:
                return
            found = self._describe()
            found.coming, found.coming_module = self._coming, self._coming_module
            found.places |= self._module_places
            data = msgspec.json.encode(found)
            if data != self._written:
                keepsake.write(self._state_dir, data)
                self._written = data

    def note_coming(self, coming: NewDevice | RamBacking | None) -> None:
        """Write that something is about to be made, before it is; None when it is settled what came of it.

        :raises EngineError: it cannot be written, or would be lost with its manager: it must not be made.
        """
        if self._state_dir is None:
            return
        self._forget_coming()
        match coming:
            case NewDevice():
                self._coming = _coming(coming)
                self._write_or_forget()
            case RamBacking():
                self._coming_module = keepsake.keep(coming)
                self._module_places = keepsake.place_all([coming], {})
                self._write_or_forget()
            case None:
                pass  # what came of it is written with all that goes with it

    def end(self) -> None:
        """The machine is over: remove what was written, and write no more. Idempotent."""
        with self._lock:
            if self._state_dir is not None and not self._is_over:
                keepsake.remove(self._state_dir)
            self._is_over = True

    def _write_or_forget(self) -> None:
        try:
            self.keep_surely()
        except EngineError:
            self._forget_coming()
            raise

    def _forget_coming(self) -> None:
        self._coming = self._coming_module = None
        self._module_places = {}


def encode_config(vm_config: VmConfig) -> msgspec.Raw:
    """:raises NotKept: it holds a text that JSON cannot carry."""
    try:
        return msgspec.Raw(form.encode(vm_config))
    except UnicodeEncodeError as error:
        raise NotKept("a file name that is not UTF-8") from error


def _coming(new: NewDevice) -> Coming:
    fdsets = fdsets_of(new.parts)
    return Coming(
        device_id=new.backing.device_id,
        slot=new.slot,
        backing=keepsake.keep(new.backing),
        places=keepsake.place_all([new.backing], fdsets),
        remains=remains(new.parts),
        fdsets=fdsets,
        undo=[step.undoes for step in reversed(steps(new.parts))],
        disks=_disks(new.device),
    )


def _disks(device: PciDevice) -> dict[str, msgspec.Raw]:
    return {device.id or "": keepsake.encode_disk(device)} if isinstance(device, DiskConfig) else {}
