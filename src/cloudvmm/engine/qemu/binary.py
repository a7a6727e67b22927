"""Which QEMU binary runs the machines, and what it can do.

Asking QEMU takes three short runs of it; the answers are cached on disk, keyed by the identity of the
file, so that an ordinary start asks nothing. The accelerator is found by `probe.py`.
"""

from __future__ import annotations

import os
import time

import msgspec

from cloudvmm.engine.base import EngineError, EngineTimeout
from cloudvmm.engine.qemu import cache
from cloudvmm.engine.qemu.attempt import Attempt
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.process import ChildProcess, ProcessSpec

BINARY_NAME = "qemu-system-x86_64"
PACKAGE_NAME = "qemu-system-x86"
MINIMUM_VERSION = (7, 2, 0)
_ANSWERS_TIMEOUT_S = 10.0  # all of them together
_FORMAT = "4"
_VERSION_WORDS = "QEMU emulator version "
_DEVICE_WORDS = 'name "'


class BinaryNotFound(EngineError):
    """There is no QEMU at the path given, or none on the search path."""


class BinaryUnusable(EngineError):
    """The file is not a QEMU for x86-64, or it does not run."""


class BinaryTooOld(EngineError):
    """The QEMU found is older than `MINIMUM_VERSION`."""


def find_binary(given: str | None, *, search_path: str | None = None) -> str:
    """Return the absolute path of the QEMU to use: `given`, else the first on `search_path` ($PATH).

    :raises BinaryNotFound: with what to install.
    """
    name = given or BINARY_NAME
    if "/" in name:
        if not _is_program(name):
            raise BinaryNotFound(f"There is no program at {name}")
        return os.path.abspath(name)
    for folder in (search_path if search_path is not None else os.environ.get("PATH", os.defpath)).split(
        os.pathsep
    ):
        if folder and _is_program(f"{folder}/{name}"):
            return os.path.abspath(f"{folder}/{name}")
    raise BinaryNotFound(
        f"{name} was not found on $PATH; on Debian and Ubuntu it is in the package {PACKAGE_NAME}"
    )


def learn_facts(binary: str, attempt: Attempt | None = None) -> QemuFacts:
    """Return the facts about `binary` (absolute path), from the cache where it knows this very file.

    Blocking: 0.2 s where the cache does not know, 10 s at worst; `attempt` may be aborted meanwhile. The
    accelerator is not decided here.

    :raises MachineGone: `attempt` was aborted.
    :raises BinaryUnusable: it does not run or is something else.
    :raises BinaryTooOld: it is older than 7.2.
    """
    try:
        subject = cache.about_program("qemu", binary, _FORMAT)
    except OSError as error:
        raise BinaryUnusable(f"{binary} cannot be read") from error
    facts = cache.load(subject, QemuFacts)
    if facts is None or not _is_there(facts.qboot_path) or not _is_there(facts.seabios_path):
        facts = _ask(binary, attempt or Attempt())
        cache.store(subject, facts)
    facts = msgspec.structs.replace(facts, binary=binary)  # what is run is never what a file says
    if facts.version < MINIMUM_VERSION:
        minimum = ".".join(str(part) for part in MINIMUM_VERSION[:2])
        raise BinaryTooOld(f"{binary} is QEMU {facts.version_text}; {minimum} or newer is needed")
    return facts


def parse_version(text: str) -> tuple[int, int, int] | None:
    """Return the version in what ``-version`` prints, or None where this is not QEMU."""
    _, found, rest = text.partition(_VERSION_WORDS)
    numbers = rest.split()[0].split(".") if found and rest.split() else []
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def parse_devices(text: str) -> frozenset[str]:
    """Return the names in what ``-device help`` prints."""
    lines = (line for line in text.splitlines() if line.startswith(_DEVICE_WORDS))
    return frozenset(line.removeprefix(_DEVICE_WORDS).partition('"')[0] for line in lines)


def parse_machines(text: str) -> frozenset[str]:
    """Return the names in what ``-machine help`` prints, without the deprecated ones."""
    _, *lines = text.splitlines() or [""]
    return frozenset(line.split()[0] for line in lines if line.strip() and "(deprecated)" not in line)


def _ask(binary: str, attempt: Attempt) -> QemuFacts:
    deadline = time.monotonic() + _ANSWERS_TIMEOUT_S
    version = parse_version(_run(attempt, deadline, binary, "-version"))
    if version is None:
        raise BinaryUnusable(f"{binary} is not a QEMU system emulator")
    folders = _run(attempt, deadline, binary, "-L", "help").splitlines()
    machines = parse_machines(_run(attempt, deadline, binary, "-machine", "help"))
    if "pc" not in machines:
        raise BinaryUnusable(f"{binary} does not emulate an x86-64 PC")
    return QemuFacts(
        binary=binary,
        version=version,
        qboot_path=_find_firmware(folders, "qboot.rom"),
        seabios_path=_find_firmware(folders, "bios-256k.bin"),
        firmware_folders=tuple(folders),
        devices=parse_devices(_run(attempt, deadline, binary, "-device", "help")),
        machines=machines,
    )


def _run(attempt: Attempt, deadline: float, binary: str, *arguments: str) -> str:
    try:
        process = ChildProcess(ProcessSpec([binary, *arguments]))
    except EngineError as error:
        raise BinaryUnusable(f"{binary} does not run") from error
    try:
        attempt.watch(process)
        process.wait(timeout_s=max(0.0, deadline - time.monotonic()))
        attempt.check()
        if process.exit_status() != 0:
            raise BinaryUnusable(f"{binary} {' '.join(arguments)} failed: {process.ending()}")
        return process.output()
    except EngineTimeout as error:
        raise BinaryUnusable(f"{binary} {' '.join(arguments)} does not answer in time") from error
    finally:
        process.close()


def _find_firmware(folders: list[str], name: str) -> str | None:
    return next((f"{folder}/{name}" for folder in folders if os.path.isfile(f"{folder}/{name}")), None)


def _is_there(path: str | None) -> bool:
    return path is None or os.path.isfile(path)


def _is_program(path: str) -> bool:
    return os.path.isfile(path) and os.access(path, os.X_OK)
