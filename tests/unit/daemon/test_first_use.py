"""Many VMMs that begin at once in a process that has used no type yet: it must not crash."""

import subprocess
import sys

MANY = 50
PROGRAM = """
import os, sys, threading
sys.setswitchinterval(1e-6)
folder = sys.argv[1]
from cloudvmm.config.operation import RestoreConfig, VmSnapshotConfig
from cloudvmm.config.payload import PayloadConfig
from cloudvmm.config.console import ConsoleConfig, ConsoleOutputMode
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.vm import VmConfig
from cloudvmm.daemon.fleet import Fleet
from cloudvmm.client import Client
from cloudvmm.engine.fake import FakeEngine

CONFIG = VmConfig(
    memory=MemoryConfig(size=64 << 20),
    payload=PayloadConfig(kernel="/bin/sh"),
    console=ConsoleConfig(mode=ConsoleOutputMode.OFF),
)

def live(name):
    gate.wait()
    held = fleet.create(name)
    os.mkdir(f"{folder}/{name}")
    with Client(held.api_socket) as vm:
        vm.vm_create(CONFIG)
        vm.vm_boot()
        vm.vm_pause()
        vm.vm_snapshot(VmSnapshotConfig(destination_url=f"file://{folder}/{name}"))
        vm.vm_delete()
        vm.vm_restore(RestoreConfig(source_url=f"file://{folder}/{name}"))
        vm.vmm_jobs()
        done.append(vm.vm_info().state.value)

fleet = Fleet(
    FakeEngine(), socket_dir=folder, max_vmms=100, max_connections=10, log=lambda level, text: None
)
count = int(sys.argv[2])
gate, done = threading.Barrier(count), []
threads = [threading.Thread(target=live, args=(f"vm{number}",)) for number in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
fleet.end()
fleet.wait(60)
print(len(done), set(done))
"""


def test_vmms_that_begin_at_once_crash_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM, str(tmp_path), str(MANY)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{MANY} {{'Paused'}}\n", "")


RESTORING = """
import sys
sys.setswitchinterval(1e-6)
from cloudvmm.daemon.fleet import Fleet
from cloudvmm.daemon.registry import Registry
from cloudvmm.engine.fake import FakeEngine

folder = sys.argv[1]
fleet = Fleet(
    FakeEngine(), socket_dir=folder, max_vmms=100, max_connections=10, log=lambda level, text: None,
    registry=Registry(f"{folder}/state"),
)
fleet.restore()
for number in range(fleet.count, int(sys.argv[2])):
    fleet.create(f"vm{number}")
print({vmm.state.value for vmm in fleet.vmms().vmms}, fleet.count)
fleet.end()
fleet.wait(60)
fleet.close()
"""


def test_vmms_that_are_restored_at_once_crash_nothing(tmp_path):
    command = [sys.executable, "-X", "faulthandler", "-c", RESTORING, str(tmp_path), "24"]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "{'Running'} 24\n", "")
