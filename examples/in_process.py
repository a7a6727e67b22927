"""Run a VM inside this program: `cloudvmm.Vmm` has the client's methods and needs no server.

python examples/in_process.py                  # in memory, no guest
python examples/in_process.py --engine qemu    # boots the default guest
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import cloudvmm
from cloudvmm.client import ServerError
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode, SerialConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig

READY_S = 120.0


def payload_for(engine: str) -> PayloadConfig:
    if engine == "fake":
        return PayloadConfig(kernel=__file__)  # it only looks whether it is there
    from cloudvmm.guest import FAST_CMDLINE, build

    guest = build()
    return PayloadConfig(kernel=guest.kernel, initramfs=guest.initramfs, cmdline=FAST_CMDLINE)


def run_vm(vmm: cloudvmm.Vmm, payload: PayloadConfig, serial: Path) -> None:
    vm_config = VmConfig(
        memory=MemoryConfig(size=256 << 20),
        payload=payload,
        serial=SerialConfig(mode=ConsoleOutputMode.FILE, file=str(serial)),
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )
    vmm.vm_create(vm_config)
    with vmm.events() as events:
        vmm.vm_boot()
        events.wait_for("vm", "booted", READY_S)
        # A driver in the guest has come up: the first thing of the guest that is seen from outside.
        activated = events.wait_for("virtio-device", "activated", READY_S)
    print("state:", vmm.wait_until_running(READY_S).state.value)
    print("the guest drives:", (activated.properties or {})["id"])
    vmm.vm_pause()
    try:
        vmm.vm_boot()
    except ServerError as error:
        print("booted twice:", error.code)
    vmm.vm_delete()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a VM inside this program.")
    parser.add_argument("--engine", choices=("fake", "qemu"), default="fake")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cloudvmm-example-") as folder:
        with cloudvmm.Vmm(args.engine, api_socket=Path(folder, "api.sock")) as vmm:
            run_vm(vmm, payload_for(args.engine), Path(folder, "serial.log"))
        print("ended:", not vmm.is_running)
    return 0


if __name__ == "__main__":
    sys.exit(main())
