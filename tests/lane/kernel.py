"""Debian's generic kernel, for guests that need a driver which the default guest's cloud kernel lacks.

It is fetched once into the cache folder, as it comes in its package. A guest gets the kernel and the modules
that its maker names. No machine is run here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import msgspec

from cloudvmm.guest import Guest
from cloudvmm.guest.cache import guests_folder
from cloudvmm.guest.cpio import write_cpio
from cloudvmm.guest.error import GuestBuildError
from cloudvmm.guest.kernel import extract_vmlinux
from cloudvmm.guest.module import WANTED, alias_index, dependency_index, module_name, select
from cloudvmm.guest.package import PackageSource, kernel_release
from cloudvmm.guest.tree import Entry, folder, regular
from lane.image import building

# Debian 12 has its own 6.1 under the plain name and the next release's beside it.
PACKAGES = ("linux-image-6.12-amd64", "linux-image-amd64")


class GenericKernel(msgspec.Struct, frozen=True):
    """A kernel in the cache folder: its package's files, and the ELF file from within its bzImage."""

    release: str
    bzimage: Path
    vmlinux: Path
    modules: Path

    def module_files(self) -> dict[str, Path]:
        """Return the file of each module that the kernel has, by the module's name."""
        return {module_name(str(path)): path for path in self.modules.rglob("*.ko*")}


def fetch_kernel() -> GenericKernel:
    """Return the kernel, fetched unless it is there. Blocking: seconds, and the network, the first time.

    :raises GuestBuildError: apt cannot deliver one.
    """
    final = guests_folder().parent / "kernel" / "generic"
    with building(final.parent) as staging:
        if not final.is_dir():
            unpacked = _unpack(staging / "package")
            _add_vmlinux(unpacked)
            unpacked.rename(final)
    return _kernel_in(final)


def guest_on(kernel: GenericKernel, guest: Guest, target: Path, *, modules: Iterable[str] = ()) -> Guest:
    """Return `guest` with `kernel` in its own's place, made in the folder `target`. Blocking: a second.

    It has the modules that every guest of ours has, those named in `modules`, and what they need. They are in
    its initramfs alone: it has none behind ``root=``.
    """
    initramfs = target / f"initramfs-{kernel.release}.cpio"
    added = module_archive(kernel, (*WANTED, *modules))
    initramfs.write_bytes(Path(guest.initramfs).read_bytes() + added)
    return msgspec.structs.replace(
        guest, kernel=str(kernel.vmlinux), bzimage=str(kernel.bzimage), initramfs=str(initramfs)
    )


def module_archive(kernel: GenericKernel, names: Iterable[str]) -> bytes:
    """Return a cpio archive of the modules `names`, of all they need, and of the indexes by which they load.

    The kernel unpacks it where it lies behind another archive in an initramfs. Names that the kernel lacks,
    because it has their drivers built in, are passed over.
    """
    return write_cpio(_with_folders(module_tree(kernel, names)))


def module_tree(kernel: GenericKernel, names: Iterable[str]) -> dict[str, bytes]:
    """Return the files of `module_archive` by their paths in the guest."""
    chosen = select(kernel.module_files(), root=kernel.modules, wanted=names)
    index = {name: module for name, (module, _) in chosen.items()}
    below = f"lib/modules/{kernel.release}"
    return {
        f"{below}/modules.dep": dependency_index(index).encode(),
        f"{below}/modules.alias": alias_index(index).encode(),
        **{f"{below}/{module.path}": content for module, content in chosen.values()},
    }


def _unpack(staging: Path) -> Path:
    packages = PackageSource(staging)
    refusals: list[Exception] = []
    for name in PACKAGES:
        try:
            return packages.unpack(packages.real_kernel(name))
        except GuestBuildError as error:
            refusals.append(error)
    raise GuestBuildError("apt has no generic kernel") from ExceptionGroup("Each was refused", refusals)


def _add_vmlinux(unpacked: Path) -> None:
    [bzimage] = (unpacked / "boot").glob("vmlinuz-*")
    vmlinux = unpacked / "boot" / f"vmlinux-{kernel_release(bzimage)}"
    vmlinux.write_bytes(extract_vmlinux(bzimage.read_bytes()))


def _kernel_in(unpacked: Path) -> GenericKernel:
    [bzimage] = (unpacked / "boot").glob("vmlinuz-*")
    release = kernel_release(bzimage)
    [modules] = (path for path in unpacked.glob(f"**/lib/modules/{release}") if path.is_dir())
    return GenericKernel(release, bzimage, unpacked / "boot" / f"vmlinux-{release}", modules)


def _with_folders(files: dict[str, bytes]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for path, content in files.items():
        for parent in reversed(PurePosixPath(path).parents[:-1]):
            entries.setdefault(str(parent), folder(str(parent)))
        entries[path] = regular(path, content)
    return list(entries.values())
