"""What a VmConfig may ask for that this engine cannot give yet.

Refused with its name, so that nothing in a configuration is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import NotSupportedYet


def check_supported(vm_config: VmConfig) -> None:
    """Raise the first thing in `vm_config` whose means come with a later release.

    :raises NotSupportedYet: there is one.
    """
    for missing in _missing(vm_config):
        raise NotSupportedYet(f"Not supported by this release: {missing}")


def _missing(vm: VmConfig) -> Iterator[str]:
    absent: dict[str, object] = {
        "pvmemcontrol": vm.pvmemcontrol,
        "the virtio RTC": vm.rtc,
        "TDX guests": vm.platform and vm.platform.tdx,
        "SEV-SNP guests": vm.platform and vm.platform.sev_snp,
    }
    yield from (name for name, present in absent.items() if present)
    yield from _missing_in_payload(vm.payload)


def _missing_in_payload(payload: PayloadConfig | None) -> Iterator[str]:
    if payload is None:
        return
    if payload.igvm is not None:
        yield "IGVM payloads"
    if payload.host_data is not None:
        yield "host data of confidential guests"
    if payload.fw_cfg_config is not None:
        yield "fw_cfg items"
