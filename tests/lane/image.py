"""The disk image of the outer machine: made once per set of inputs, kept in the cache folder, never changed.

It is the default guest's own root tree with the files of `content.py` laid over it, and the inner guest in
/guest. The project itself is not in it: `project_archive` packs that anew for every run, so that a change
in the source costs no new image. What runs the image is `machine.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from cloudvmm.guest import Guest
from cloudvmm.guest.cache import guests_folder
from cloudvmm.guest.disk import PARTITION_START_BYTES
from cloudvmm.guest.tool import run_tool
from lane.content import PROGRAMS, SITE_PACKAGES, VENV, Files, collect, interpreter

PROJECT = "/project"
GUEST = "/guest"
_ROOT = Path(__file__).parents[2]
_LAYOUT = 1  # raised when the image changes in a way that its inputs do not show
_KEPT = 3
_BLOCK_BYTES = 4096


def build_image(
    guest: Guest, *, programs: Sequence[str] = (), trees: Sequence[Path] = ()
) -> tuple[Path, bool]:
    """Return the image for `guest` and whether it was made just now. Blocking: half a second, or a few.

    `programs` are those of this machine that it gets beyond every image's, `trees` folders with another QEMU.

    :raises ContentError: something that must be in it is not on this machine.
    :raises GuestBuildError: a program of e2fsprogs is missing or refuses.
    """
    files = collect((*PROGRAMS, *programs), trees=trees)
    guest_files = {
        f"{GUEST}/{Path(path).name}": Path(path) for path in (guest.kernel, guest.initramfs, guest.disk)
    }
    image = guests_folder().parent / "lane" / f"{_key(files | guest_files)}.ext4"
    if image.exists():
        os.utime(image)
        return image, False
    with building(image.parent) as staging:
        if not image.exists():
            root = staging / "root"
            root.mkdir()
            _lay_out(root, files, guest_files, guest=guest)
            _write_ext4(staging / "image", root)
            (staging / "image").replace(image)
            _forget_old_images(image.parent)
    return image, True


def project_archive(extra: Mapping[str, bytes] = MappingProxyType({})) -> bytes:
    """Return a tar archive of the project as it is now, compiled, and of `extra` by path, for /project."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=buffer, mode="w") as archive:
        root = Path(folder)
        for name in ("src", "tests"):
            shutil.copytree(_ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(_ROOT / "pyproject.toml", root)
        _compile(root, seen_as=PROJECT)
        for name, content in extra.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
        archive.add(root, ".")
    return buffer.getvalue()


def _key(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256(f"{_LAYOUT} {VENV} {PROJECT}".encode())
    for name, path in sorted(files.items()):
        status = path.stat()
        digest.update(f"\0{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Hold the builders' lock in `folder`; give an empty folder in it, removed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / "staging"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging)


def _lay_out(root: Path, files: Files, guest_files: Files, *, guest: Guest) -> None:
    run_tool(
        ["debugfs", "-R", f"rdump / {root}", f"{guest.disk}?offset={PARTITION_START_BYTES}"],
        package="e2fsprogs",
    )
    for name, path in (files | guest_files).items():
        target = root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a link to busybox gives way to the real program
        shutil.copy2(path, target)
    inner = msgspec.structs.replace(
        guest,
        **{part: f"{GUEST}/{Path(getattr(guest, part)).name}" for part in ("kernel", "initramfs", "disk")},
    )
    (root / f"{GUEST}/guest.json".lstrip("/")).write_bytes(msgspec.json.encode(inner))
    (root / PROJECT.lstrip("/")).mkdir()
    _lay_out_environment(root)
    _compile(root, seen_as="/")


def _lay_out_environment(root: Path) -> None:
    """Make a virtual environment of the distributions, with the project as an editable install has it."""
    venv = root / VENV.lstrip("/")
    (venv / "bin").mkdir()
    for name in ("python", "python3"):
        (venv / "bin" / name).symlink_to(interpreter())
    (venv / "pyvenv.cfg").write_text(f"home = {interpreter().parent}\ninclude-system-site-packages = false\n")
    (root / SITE_PACKAGES.lstrip("/") / "project.pth").write_text(f"{PROJECT}/src\n")
    command = venv / "bin/cloudvmm"
    command.write_text(
        f"#!{VENV}/bin/python\nimport sys\nfrom cloudvmm.cli.main import main\nsys.exit(main())\n"
    )
    command.chmod(0o755)


def _compile(folder: Path, *, seen_as: str) -> None:
    """Compile what is not compiled yet: under emulation that costs ten times as much."""
    argv = [
        sys.executable,
        "-m",
        "compileall",
        "-q",
        "-j",
        "0",
        "-s",
        str(folder),
        "-p",
        seen_as,
        str(folder),
    ]
    subprocess.run(argv, timeout=300, check=True)


def _write_ext4(image: Path, root: Path) -> None:
    """Write `image` with the tree at `root`; without a journal, for nobody will ever write to it."""
    paths = [root, *root.rglob("*")]
    blocks = sum(2 + path.lstat().st_size // _BLOCK_BYTES for path in paths)
    size_kib = (blocks + blocks // 16 + 4096) * (_BLOCK_BYTES // 1024)
    options = ["-t", "ext4", "-O", "^has_journal,^resize_inode", "-m", "0", "-b", str(_BLOCK_BYTES)]
    argv = [
        "mke2fs",
        "-q",
        "-F",
        *options,
        "-N",
        str(len(paths) + 256),
        "-d",
        str(root),
        str(image),
        f"{size_kib}k",
    ]
    run_tool(argv, package="e2fsprogs")


def _forget_old_images(folder: Path) -> None:
    images = sorted(folder.glob("*.ext4"), key=lambda path: path.stat().st_mtime)
    for image in images[:-_KEPT]:
        image.unlink()
