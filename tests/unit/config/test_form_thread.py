"""The form used by many threads at once. In a process of its own: what it guards against is a crash."""

import subprocess
import sys

import pytest

FIRST_USE = """
import sys, threading
sys.setswitchinterval(1e-6)
from cloudvmm.api.data import VmInfo, VmState
from cloudvmm.config import form
from cloudvmm.config.vm import VmConfig

def encode():
    gate.wait()
    results.append(form.encode(VmInfo(config=VmConfig(), state=VmState.CREATED, memory_actual_size=1)))

def decode():
    gate.wait()
    results.append(form.decode(b'{"payload":{"kernel":"/k"},"disks":[{"path":"/d"}]}', VmConfig))

gate, results = threading.Barrier(8), []
threads = [threading.Thread(target=work) for work in [encode, decode] * 4]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(results))
"""


@pytest.mark.parametrize("attempt", range(4))
def test_first_use_by_eight_threads_at_once_crashes_nothing(attempt):
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")
