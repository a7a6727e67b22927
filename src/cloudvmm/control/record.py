"""What is known about a VM beside its config, in the form that a snapshot keeps and a migration carries.

The engine's own state is not here: this is names, places and sizes. A change of the form raises `FORMAT` of
`snapshot/state.py` and `VERSION` of `migration/message.py`.
"""

from __future__ import annotations

import msgspec

from cloudvmm.config import form
from cloudvmm.config.number import U32
from cloudvmm.control.error import BadRecord, OtherVcpus
from cloudvmm.control.numbering import Numbering
from cloudvmm.control.ram import GuestRam, Ram, Vcpus
from cloudvmm.control.vm import Vm
from cloudvmm.engine.base import EngineInfo


class VmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`slots` to `counter` are the numbering's, `vcpus` to `guest_ram` the VM's, under the same names."""

    slots: dict[str, int]
    virtio: list[str]
    kinds: dict[str, str]
    trapped: list[str]
    given_ids: list[str]
    counter: U32
    vcpus: Vcpus
    ram: Ram
    guest_ram: GuestRam

    def numbering(self, info: EngineInfo) -> Numbering:
        """Return the numbering to go on with, on an engine with the slots of `info`."""
        return Numbering(
            slots=dict(self.slots),
            virtio=list(self.virtio),
            kinds=dict(self.kinds),
            trapped=set(self.trapped),
            given_ids=set(self.given_ids),
            counter=self.counter,
            first_slot=info.first_slot,
            last_slot=info.last_slot,
        )

    def check_vcpus(self, boot_vcpus: int) -> None:
        """:raises OtherVcpus: a configuration with `boot_vcpus` is not that of the VM."""
        present = self.vcpus.present
        if boot_vcpus != present and not (self.vcpus.is_removing and boot_vcpus < present):
            raise OtherVcpus(present, boot_vcpus)

    def give_sizes(self, vm: Vm) -> None:
        """Have `vm` know what its machine was told before."""
        vm.vcpus, vm.ram, vm.guest_ram = self.vcpus, self.ram, self.guest_ram
        vm.guest_vcpus = self.vcpus.present
        for number in range(len(self.ram.modules)):
            vm.note_module(number)


def encode_record(vm: Vm) -> msgspec.Raw:
    numbering = vm.numbering
    record = VmRecord(
        slots=numbering.slots,
        virtio=numbering.virtio,
        kinds=numbering.kinds,
        trapped=sorted(numbering.trapped),
        given_ids=sorted(numbering.given_ids),
        counter=numbering.counter,
        vcpus=vm.vcpus,
        ram=vm.ram,
        guest_ram=vm.guest_ram,
    )
    return msgspec.Raw(msgspec.json.encode(record))


def decode_record(raw: msgspec.Raw) -> VmRecord:
    """:raises BadRecord: it is none."""
    try:
        record: VmRecord = form.decoder(VmRecord).decode(raw)
    except form.MALFORMED as error:
        raise BadRecord from error
    return record
