"""What the outer machine holds, as a mapping from its paths to files of this machine.

Everything keeps its path, so that nothing has to be told where it lies now: the interpreter that runs the
tests with its standard library, QEMU with its firmware, and all the shared libraries that these load. Only
the distributions that pytest and the project need move, into a virtual environment of the machine's own.
How this becomes a disk is `image.py`'s business.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement

VENV = "/venv"
SITE_PACKAGES = f"{VENV}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
DISTRIBUTIONS = ("cloudvmm", "jsonschema-rs", "pytest", "pytest-timeout")
PROGRAMS = ("qemu-system-x86_64", "setpriv")
FIRMWARE = ("qboot.rom", "bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin", "efi-virtio.rom")

QEMU = "usr/bin/qemu-system-x86_64"

# Folders of the standard library that no test of ours imports.
_UNUSED = frozenset(
    ("test", "tests", "idlelib", "ensurepip", "tkinter", "turtledemo", "lib2to3", "pydoc_data", "distutils")
)
_INSTALLED = frozenset(("site-packages", "dist-packages", "__pycache__"))
_UNUSED_EXTENSION = re.compile(r"_(test|xxtest|ctypes_test|tkinter|xxsub)|xx")
_LIBRARY = re.compile(r"(/\S+) \(0x")

Files = dict[str, Path]


class ContentError(Exception):
    """Something that the outer machine needs is not on this one."""


def interpreter() -> Path:
    """Return the program that runs this very test, behind all virtual environments and links."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def program(name: str) -> Path:
    if found := shutil.which(name):
        return Path(found)
    raise ContentError(f"The program {name} is not installed")


def distributions(names: Iterable[str] = DISTRIBUTIONS) -> dict[str, importlib.metadata.Distribution]:
    """Return the distributions `names` and all that they require here, by lower-case name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        requirements = (Requirement(text) for text in found[name].requires or ())
        waiting += [
            one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})
        ]
    return dict(sorted(found.items()))


def collect(names: Sequence[str] = PROGRAMS, *, trees: Sequence[Path] = ()) -> Files:
    """Return every file that the image gets besides the default guest's. Blocking: a second.

    `names` are the programs; the first is QEMU. Of unpacked packages in `trees` it gets QEMU's own.

    :raises ContentError: a program, a library or a firmware is missing.
    """
    files = dict(_python_files())
    for distribution in distributions().values():
        files |= _distribution_files(distribution)
    programs = {str(program(name)): program(name) for name in names}
    files |= programs
    for tree in trees:
        files |= _unpacked_qemu(tree)
        programs[str(tree / QEMU)] = tree / QEMU
    files |= _firmware_files(programs[str(program(names[0]))])
    loaded = [path for name, path in files.items() if ".so" in path.suffixes or name in programs]
    return files | _library_files([interpreter(), *loaded])


def _unpacked_qemu(tree: Path) -> Files:
    """Return the program, the accelerators and the firmware of the QEMU that was unpacked in `tree`.

    Its other modules are for sound and displays.
    """
    wanted = ((tree / "usr/lib", "accel-*.so"), (tree / "usr/share/qemu", "*"))
    found = (path for folder, name in wanted for path in folder.rglob(name) if path.is_file())
    return {str(path): path for path in (tree / QEMU, *found)}


def _python_files() -> Iterator[tuple[str, Path]]:
    yield str(interpreter()), interpreter()
    for folder in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}:
        root = Path(folder)
        extensions = Path(sysconfig.get_config_var("DESTSHARED") or root / "lib-dynload")
        for path in _walk(root):
            if path.suffix == ".py" or (path.parent == extensions and not _UNUSED_EXTENSION.match(path.name)):
                yield from _with_bytecode(str(path), path)


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and path.name not in _UNUSED | _INSTALLED and not path.name.startswith("config-"):
            yield from _walk(path)


def _with_bytecode(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """Give the file and, where it was compiled already, what came of it: compiling costs seconds."""
    yield name, path
    compiled = path.parent / "__pycache__" / f"{path.stem}.{sys.implementation.cache_tag}.pyc"
    if path.suffix == ".py" and compiled.exists():
        yield f"{Path(name).parent}/__pycache__/{compiled.name}", compiled


def _distribution_files(distribution: importlib.metadata.Distribution) -> Files:
    files: Files = {}
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        # Not what lies outside (scripts), nor the pointer to where the project is on this machine.
        if entry.parts[0] != ".." and path.suffix != ".pth" and path.is_file():
            files |= dict(_with_bytecode(f"{SITE_PACKAGES}/{entry}", path))
    return files


def _firmware_files(qemu: Path) -> Files:
    folders = _output([str(qemu), "-L", "help"]).split()
    found = {
        name: Path(folder, name)
        for folder in reversed(folders)
        for name in FIRMWARE
        if Path(folder, name).is_file()
    }
    if missing := set(FIRMWARE) - set(found):
        raise ContentError(f"QEMU's firmware is missing: {', '.join(sorted(missing))}")
    return {str(path): path for path in found.values()}


def _library_files(programs: Iterable[Path]) -> Files:
    """Return what the dynamic loader would load for `programs`, and itself, under the names it uses."""
    text = _output(["ldd", *map(str, programs)])
    if missing := re.findall(r"(\S+) => not found", text):
        raise ContentError(f"Shared libraries are missing: {', '.join(missing)}")
    return {name: Path(name) for name in _LIBRARY.findall(text)}


def _output(argv: list[str]) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
