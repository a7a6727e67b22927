"""Drive a `cloudvmm` process with the typed client, by blocking.

    python examples/client.py [SOCKET]

Without SOCKET it starts `cloudvmm --engine fake` in a temporary folder, which runs no guest, and ends it
again. With the socket of any server of Cloud Hypervisor's API, the real one too, it speaks to that one; the
payload below is then yours to change.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cloudvmm import api
from cloudvmm.client import Client, ServerError
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.disk import DiskConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig

READY_S = 10.0
END_S = 10.0


@contextlib.contextmanager
def started_server() -> Iterator[Path]:
    """Give the socket of a server of our own; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="cloudvmm-example-") as folder:
        socket = Path(folder, "api.sock")
        program = [sys.executable, "-m", "cloudvmm.cli.main", "--engine", "fake"]
        argv = [*program, "--api-socket", str(socket), "--log-file", str(Path(folder, "log"))]
        with subprocess.Popen(argv) as server:
            try:
                yield socket
            finally:
                server.terminate()
                server.wait(END_S)


def live_and_die(client: Client) -> None:
    """Take one VM from its configuration to its deletion."""
    vm_config = VmConfig(
        memory=MemoryConfig(size=256 << 20),
        payload=PayloadConfig(kernel=__file__),  # the fake engine only looks whether it is there
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )
    client.vm_create(vm_config)
    client.vm_add_disk(DiskConfig(path=__file__, readonly=True, id="data"))
    client.vm_boot()
    info = client.wait_until_running(READY_S)
    print(f"{info.state.value}, {info.memory_actual_size >> 20} MiB, {', '.join(info.device_tree or {})}")
    with client.events() as events:
        client.vm_pause()
        print("event:", events.wait_for("vm", "paused", READY_S).event)
    client.vm_delete()


def main() -> int:
    with contextlib.ExitStack() as ending:
        socket = Path(sys.argv[1]) if len(sys.argv) > 1 else ending.enter_context(started_server())
        client = ending.enter_context(Client(socket))
        client.wait_until_ready(READY_S)
        print("speaks the API of Cloud Hypervisor", client.vmm_ping().version)
        try:
            client.vm_info()
        except ServerError as error:
            print(f"refused: {error.code}, status {error.status}")
            if error.find(api.VmNotCreated):
                live_and_die(client)
    return 0


if __name__ == "__main__":
    sys.exit(main())
