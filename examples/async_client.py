"""Drive a `cloudvmm` process from asyncio: one task watches the events, another works.

    python examples/async_client.py

It starts `cloudvmm --engine fake` in a temporary folder, which runs no guest.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from cloudvmm.client import AsyncClient, AsyncEventStream, InternalServerError
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.vm import VmConfig

READY_S = 10.0


async def watch(stream: AsyncEventStream) -> None:
    """Print every event until the server has ended."""
    async with stream:
        async for event in stream:
            print(f"  {event.number}: {event.source}/{event.event}")


async def work(client: AsyncClient) -> None:
    vm_config = VmConfig(
        payload=PayloadConfig(kernel=__file__),  # the fake engine only looks whether it is there
        console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
    )
    await client.vm_create(vm_config)
    await client.vm_boot()
    ping, info = await asyncio.gather(client.vmm_ping(), client.wait_until_running(READY_S))
    print(f"Cloud Hypervisor {ping.version}: {info.state.value}")
    await client.vm_pause()
    try:
        await client.vm_pause()
    except InternalServerError as error:
        print("paused twice:", error.chain[-1])
    await client.vmm_shutdown()


async def main() -> int:
    with tempfile.TemporaryDirectory(prefix="cloudvmm-example-") as folder:
        socket = Path(folder, "api.sock")
        program = ["-m", "cloudvmm.cli.main", "--engine", "fake", "--log-file", str(Path(folder, "log"))]
        server = await asyncio.create_subprocess_exec(sys.executable, *program, "--api-socket", str(socket))
        try:
            async with AsyncClient(socket) as client:
                await client.wait_until_ready(READY_S)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(watch(await client.events(from_number=0)))
                    tasks.create_task(work(client))
            return await server.wait()
        finally:
            if server.returncode is None:
                server.terminate()
                await server.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
