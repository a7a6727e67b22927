"""Run a VM through the internal API: in this process, without a socket, without a guest.

    python examples/internal_api.py [KERNEL]

The VM runs on the fake engine, which keeps an engine's whole contract in memory. Any other engine goes in
its place: nothing else in this program would change. The fake engine looks whether the kernel is there and
does not run it, so that any file does for KERNEL; by default it is this one.
"""

from __future__ import annotations

import sys

from cloudvmm import api
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.control.vmm import VmmThread
from cloudvmm.engine.fake import FakeEngine

END_S = 30.0


def live_and_die(vmm: VmmThread, kernel: str) -> None:
    """Take one VM from its configuration to its deletion.

    :raises api.ApiError: a command was refused; its causes say why.
    """
    vm_config = VmConfig(
        memory=MemoryConfig(size=256 << 20),
        payload=PayloadConfig(kernel=kernel, cmdline="console=hvc0"),
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )
    api.vm_create(vmm.api_evt, vmm.api_sender, vm_config)
    tell(vmm, "created")
    api.vm_boot(vmm.api_evt, vmm.api_sender)
    tell(vmm, "booted")
    api.vm_pause(vmm.api_evt, vmm.api_sender)
    tell(vmm, "paused")
    try:
        api.vm_pause(vmm.api_evt, vmm.api_sender)
    except api.VmPauseError as error:
        print(f"paused twice: {error}: {error.__cause__}")
    api.vm_resume(vmm.api_evt, vmm.api_sender)
    tell(vmm, "resumed")
    api.vm_shutdown(vmm.api_evt, vmm.api_sender)
    tell(vmm, "shut down")
    api.vm_delete(vmm.api_evt, vmm.api_sender)


def tell(vmm: VmmThread, when: str) -> None:
    info = api.vm_info(vmm.api_evt, vmm.api_sender)
    devices = ", ".join(info.device_tree or {}) or "none"
    print(f"{when}: {info.state.value}, {info.memory_actual_size >> 20} MiB, devices: {devices}")


def main() -> int:
    kernel = sys.argv[1] if len(sys.argv) > 1 else __file__
    vmm = VmmThread(FakeEngine())
    vmm.events.subscribe(lambda event: print(f"  event {event.source}/{event.event}"))
    try:
        ping = api.vmm_ping(vmm.api_evt, vmm.api_sender)
        print(f"{ping.build_version} speaks the API of Cloud Hypervisor {ping.version}")
        live_and_die(vmm, kernel)
    finally:
        api.vmm_shutdown(vmm.api_evt, vmm.api_sender)
        vmm.join(END_S)
        vmm.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
