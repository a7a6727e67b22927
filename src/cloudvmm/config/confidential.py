"""Rules about confidential guests, TDX and SEV-SNP.

The reference has them in builds with these features only. Whether the host can run such a guest is the
engine's answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloudvmm.config.error import ValidationError

if TYPE_CHECKING:
    from cloudvmm.config.vm import VmConfig

HOST_DATA_DIGITS = 64


class TdxFirmwareMissing(ValidationError):
    """No TDX firmware specified"""


class TdxNoCpuHotplug(ValidationError):
    """CPU hotplug is not permitted with TDX"""


class InvalidHostData(ValidationError):
    """Invalid host data format"""


class SevSnpRequiresIgvm(ValidationError):
    """SEV-SNP requires an IGVM payload (--payload igvm=<path>)"""


def check_confidential(vm: VmConfig) -> None:
    """Raise the first rule that a confidential `vm` breaks; its payload has been checked before."""
    if vm.platform is None or vm.payload is None:
        return
    if vm.platform.tdx and vm.payload.firmware is None:
        raise TdxFirmwareMissing
    if vm.platform.tdx and vm.cpus.max_vcpus != vm.cpus.boot_vcpus:
        raise TdxNoCpuHotplug
    if not vm.platform.sev_snp:
        return
    if vm.payload.host_data is not None and len(vm.payload.host_data) != HOST_DATA_DIGITS:
        raise InvalidHostData
    if vm.payload.igvm is None:
        raise SevSnpRequiresIgvm
