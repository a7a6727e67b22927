"""Build the default guest: Debian's cloud kernel, busybox and our init, as four files.

The steps are here in order; each one's craft is in a file of its own.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cloudvmm.guest.cache import Guest, building, locate, publish, source_hash
from cloudvmm.guest.cpio import write_cpio
from cloudvmm.guest.disk import write_disk
from cloudvmm.guest.error import GuestBuildError, GuestNotBuilt
from cloudvmm.guest.kernel import extract_vmlinux
from cloudvmm.guest.module import alias_index, dependency_index, module_name, select
from cloudvmm.guest.package import PackageSource, installed_busybox, installed_kernel, kernel_release
from cloudvmm.guest.tool import run_tool
from cloudvmm.guest.tree import Entry, root_tree

KERNEL_PACKAGE = "linux-image-cloud-amd64"


class _Parts(msgspec.Struct, frozen=True):
    """What Debian gives: the kernel's image, its modules' folder, the static busybox."""

    release: str
    image: Path
    modules: Path
    busybox: Path


def build(*, refresh: bool = False) -> Guest:
    """Return the default guest, building it when it is not there. Blocks: seconds, and the network.

    With `refresh` it is built anew from the packages that are current now.

    :raises GuestBuildError: when a package, a program or the file system stood in the way.
    """
    if not refresh:
        try:
            return locate()
        except GuestNotBuilt:
            pass
    try:
        with building() as staging:
            return _build_in(staging, refresh=refresh)
    except OSError as error:
        raise GuestBuildError from error


def _build_in(staging: Path, *, refresh: bool) -> Guest:
    if not refresh:
        try:
            return locate()  # another builder had the lock before us
        except GuestNotBuilt:
            pass
    parts = _gather(PackageSource(staging))
    tree = _tree(parts)
    folder = staging / "guest"
    folder.mkdir()
    bzimage = parts.image.read_bytes()
    (folder / "bzImage").write_bytes(bzimage)
    (folder / "vmlinux").write_bytes(extract_vmlinux(bzimage))
    (folder / "initramfs.cpio").write_bytes(write_cpio(tree))
    write_disk(folder / "disk.raw", tree, staging=staging)
    return publish(folder, f"{parts.release}-{source_hash()}")


def _gather(packages: PackageSource) -> _Parts:
    busybox = installed_busybox() or packages.unpack("busybox-static") / "bin/busybox"
    if image := installed_kernel():
        release = kernel_release(image)
        return _Parts(release, image, Path("/lib/modules", release), busybox)
    root = packages.unpack(packages.real_kernel(KERNEL_PACKAGE))
    images = list((root / "boot").glob("vmlinuz-*"))
    if len(images) != 1:
        raise GuestBuildError(f"The kernel package holds {len(images)} kernels")
    release = kernel_release(images[0])
    return _Parts(release, images[0], _modules_folder(root, release), busybox)


def _modules_folder(root: Path, release: str) -> Path:
    """Return the modules' folder in an unpacked package: Debian moved it below /usr in 2024."""
    for folder in (root / "lib/modules" / release, root / "usr/lib/modules" / release):
        if folder.is_dir():
            return folder
    raise GuestBuildError(f"The kernel package holds no modules for {release}")


def _tree(parts: _Parts) -> list[Entry]:
    files = {module_name(str(path)): path for path in parts.modules.rglob("*.ko*")}
    chosen = select(files, root=parts.modules)
    index = {name: module for name, (module, _) in chosen.items()}
    below = f"lib/modules/{parts.release}"
    contents = {f"{below}/{module.path}": content for module, content in chosen.values()}
    contents[f"{below}/modules.dep"] = dependency_index(index).encode()
    contents[f"{below}/modules.alias"] = alias_index(index).encode()
    applets = run_tool([str(parts.busybox), "--list-full"], package="busybox-static").decode().split()
    return root_tree(busybox=parts.busybox.read_bytes(), applets=applets, modules=contents)
