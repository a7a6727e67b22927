"""What a VMM with a state folder has written down of itself, for the next one on that folder.

One file, written anew as a whole and by a rename: before a command that changes something is begun, and
before it is answered. `vm_config` is in the reference's own form. The machine's own state is the engine's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

import msgspec

from cloudvmm.api import action
from cloudvmm.api.data import VmState
from cloudvmm.config import form
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.console import KeptPty
from cloudvmm.control.holding import Holding, Intent
from cloudvmm.control.record import encode_record
from cloudvmm.errors import VmmError
from cloudvmm.host.own_folder import replace_file

FORMAT: Final = 1
NOTHING: Final = msgspec.Raw(b"null")  # msgspec reads no member that is either raw or None
_FILE: Final = "vm"


class LedgerInvalid(VmmError):
    def __init__(self, path: str) -> None:
        super().__init__(f"What the last VMM wrote down in {path!r} cannot be read")


class LedgerFormat(VmmError):
    def __init__(self, path: str, found: int) -> None:
        super().__init__(
            f"The VM in {path!r} was written down in format {found}, this release reads {FORMAT}; "
            "use the release that wrote it"
        )


class LedgerNotWritten(VmmError):
    """What a VMM after this one has to know could not be written"""


class UnderWay(msgspec.Struct, frozen=True, kw_only=True):
    """The command that has begun, with a VM in `state`, or a config that it `has_config` of, or nothing.

    `data` is the request's body, if it has one that can be read again.
    """

    command: str
    state: VmState | None = None
    has_config: bool = False
    data: msgspec.Raw = NOTHING


class KeptDevice(msgspec.Struct, frozen=True):
    """A device that is being added: what the config is with it, and where it goes."""

    vm_config: msgspec.Raw
    device_id: str
    slot: int


class KeptLent(msgspec.Struct, frozen=True):
    """The VM is on its way to another VMM, or `has_left`. `state` is that of before."""

    state: VmState
    is_given: bool
    has_left: bool


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """`state` and `record` are those of the VM object. What is not there is `NOTHING`, or None."""

    format: int = FORMAT
    vm_config: msgspec.Raw = NOTHING
    state: VmState | None = None
    record: msgspec.Raw = NOTHING
    consoles: dict[int, KeptPty] = msgspec.field(default_factory=dict)
    under_way: UnderWay | None = None
    coming: KeptDevice | None = None
    arrived: VmState | None = None
    lent: KeptLent | None = None


class Book:
    """Writes the ledger of what `holding` holds. Used by the control loop's thread alone."""

    def __init__(self, state_dir: str, holding: Holding, log: Callable[[str, str], None]) -> None:
        self._path = f"{state_dir}/{_FILE}"
        self._holding = holding
        self._log = log
        self._under_way: UnderWay | None = None
        self._inherited: Ledger | None = None
        self._written = b""
        self._encoded: tuple[VmConfig | None, msgspec.Raw] = (None, NOTHING)

    def inherit(self, ledger: Ledger | None) -> None:
        """Tell of what the last VMM had under way, by its `ledger`, until that is finished or taken back.

        A VMM after this one, which may be killed before, looks at all of it anew.
        """
        self._inherited = ledger

    def begin(self, name: str, request: action.ApiRequest | None) -> None:
        """Write that a command is about to be carried out."""
        vm = self._holding.vm
        self._under_way = UnderWay(
            command=name,
            state=None if vm is None else vm.state,
            has_config=self._holding.vm_config is not None,
            data=_data_of(request),
        )
        self.write()

    def end(self) -> None:
        """Write what came of it."""
        self._under_way = self._inherited = self._holding.intent = self._holding.arrived = None
        self.write()

    def write(self) -> None:
        """Write what there is now, if it is news. A fault is told of, and costs the VM nothing else."""
        try:
            self.promise()
        except LedgerNotWritten as error:
            self._log("error", f"The state of the VM cannot be written: {error.__cause__}")

    def promise(self) -> None:
        """As `write`, before what would be lost unless it was written.

        :raises LedgerNotWritten: it cannot be; what was there before is.
        """
        try:
            data = msgspec.json.encode(self._ledger())
            if data != self._written:
                replace_file(self._path, data)
                self._written = data
        except (OSError, UnicodeEncodeError) as error:
            raise LedgerNotWritten from error

    def _ledger(self) -> Ledger:
        holding, vm = self._holding, self._holding.vm
        vm_config = holding.vm_config
        if vm_config is not self._encoded[0]:
            self._encoded = (vm_config, NOTHING if vm_config is None else _raw(vm_config))
        ledger = Ledger(
            vm_config=self._encoded[1],
            state=None if vm is None else vm.state,
            record=NOTHING if vm is None else encode_record(vm),
            consoles={} if holding.consoles is None else holding.consoles.kept_ptys,
            under_way=self._under_way,
            coming=_coming(holding.intent),
            arrived=holding.arrived,
            lent=_lent(holding),
        )
        old = self._inherited
        if old is None:
            return ledger
        return msgspec.structs.replace(
            ledger, under_way=old.under_way, coming=old.coming, arrived=old.arrived, lent=old.lent
        )


def read_ledger(state_dir: str) -> Ledger | None:
    """Return what the last VMM on the folder wrote, None where there was none.

    :raises LedgerInvalid: it cannot be read. :raises LedgerFormat: another release wrote it.
    """
    try:
        with open(f"{state_dir}/{_FILE}", "rb") as file:
            ledger: Ledger = form.decoder(Ledger).decode(file.read())
    except FileNotFoundError:
        return None
    except (OSError, *form.MALFORMED) as error:
        raise LedgerInvalid(state_dir) from error
    if ledger.format != FORMAT:
        raise LedgerFormat(state_dir, ledger.format)
    return ledger


def is_there(raw: msgspec.Raw) -> bool:
    return bytes(raw) != bytes(NOTHING)


def data_of(under_way: UnderWay) -> tuple[type[action.ApiRequest], object] | None:
    """Return the request that was under way, and its data; None where it cannot be made again."""
    for kind in action.COMMANDS:
        if kind.name == under_way.command:
            if kind.body is None:
                return kind, None
            if not is_there(under_way.data):
                return None
            return kind, form.decode_saved(bytes(under_way.data), kind.body)
    return None


def _data_of(request: action.ApiRequest | None) -> msgspec.Raw:
    if request is None or request.body is None or not isinstance(request.data, msgspec.Struct):
        return NOTHING
    with contextlib.suppress(UnicodeEncodeError, TypeError):
        return _raw(request.data)
    return NOTHING


def _lent(holding: Holding) -> KeptLent | None:
    lent = holding.left or holding.lent
    if lent is None:
        return None
    return KeptLent(lent.info.state, lent.is_given, has_left=holding.left is not None)


def _coming(intent: Intent | None) -> KeptDevice | None:
    if intent is None:
        return None
    return KeptDevice(_raw(intent.vm_config), intent.device_id, intent.slot)


def _raw(value: msgspec.Struct) -> msgspec.Raw:
    return msgspec.Raw(form.encode(value))
