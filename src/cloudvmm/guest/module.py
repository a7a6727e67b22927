"""Which kernel modules the guest gets, and the indexes by which its modprobe finds them.

The indexes are made here from the modules' own `.modinfo`, so neither the build machine nor the
guest needs depmod, and they name only the modules that the guest has.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from cloudvmm.guest.tool import run_tool

# What a guest may meet: every virtio device on offer, the platform's buttons and panic device,
# persistent memory, passthrough, file systems that tests mount, and KVM for guests that nest.
# A name that the kernel lacks (built in, or not configured) is left out without a word.
WANTED = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_scsi"),
    *("virtio_balloon", "virtio_mem", "virtio_pmem", "virtio_input", "virtio_iommu", "virtiofs", "fuse"),
    *("vmw_vsock_virtio_transport", "vsock", "vsock_diag", "vsock_loopback"),
    *("nfit", "nd_pmem", "nd_e820", "dax_pmem", "device_dax", "kmem"),
    *("button", "evdev", "pvpanic_mmio", "pvpanic_pci", "i6300esb", "iTCO_wdt", "ptp_kvm", "acpi_tad"),
    *("nvme", "e1000e", "tpm_crb", "tpm_tis", "vfio_pci", "vfio_iommu_type1"),
    *("overlay", "loop", "squashfs", "vfat", "exfat", "nls_cp437", "nls_ascii", "nls_utf8", "nls_iso8859_1"),
    *("tun", "bridge", "veth", "virtio_vdpa"),
    *("irqbypass", "kvm", "kvm_amd"),
)


class Module(msgspec.Struct, frozen=True):
    """One module file: what it is called, needs, and answers to."""

    name: str
    path: str
    depends: tuple[str, ...] = ()
    softdeps: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def module_name(path: str) -> str:
    """Return the kernel's name of the module in the file `path`: "virtio-rng.ko" is virtio_rng."""
    return Path(path).name.split(".ko", 1)[0].replace("-", "_")


def read_modinfo(path: str, content: bytes) -> Module:
    """Read the dependencies and aliases that the module file `content` declares of itself."""
    fields: dict[bytes, list[str]] = {b"depends": [], b"alias": [], b"softdep": []}
    for key, values in fields.items():
        # A field is "key=value" between two NULs; nothing else in a module looks like that.
        for piece in content.split(b"\0" + key + b"=")[1:]:
            values.append(piece.split(b"\0", 1)[0].decode("ascii", "replace"))
    depends = tuple(name.replace("-", "_") for text in fields[b"depends"] for name in text.split(",") if name)
    return Module(
        name=module_name(path),
        path=path,
        depends=depends,
        softdeps=tuple(fields[b"softdep"]),
        aliases=tuple(fields[b"alias"]),
    )


def select(
    files: Mapping[str, Path], *, root: Path, wanted: Iterable[str] = WANTED
) -> dict[str, tuple[Module, bytes]]:
    """Return the wanted modules and all they depend on, with their contents, by name.

    `files` maps each module that the kernel has to its file below `root`. Compressed modules come
    out plain, with the compression's ending cut from their path.
    """
    chosen: dict[str, tuple[Module, bytes]] = {}
    waiting = [name for name in wanted if name in files]
    while waiting:
        name = waiting.pop()
        if name in chosen or name not in files:
            continue
        content = _plain(files[name])
        path = str(files[name].relative_to(root)).removesuffix(".xz").removesuffix(".zst")
        module = read_modinfo(path, content)
        chosen[name] = (module, content)
        waiting.extend(module.depends)
    return dict(sorted(chosen.items()))


def _plain(path: Path) -> bytes:
    """Return the module in `path` uncompressed: newer Debian kernels ship .ko.xz."""
    content = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".zst":
            return run_tool(["zstd", "-dcq"], package="zstd", stdin=content)
        case _:
            return content


def dependency_index(modules: Mapping[str, Module]) -> str:
    """Return modules.dep: each module's path and those of all it needs, nearest first."""
    lines = []
    for module in modules.values():
        needs = " ".join(modules[name].path for name in _closure(module, modules))
        lines.append(f"{module.path}: {needs}".rstrip())
    return "\n".join(lines) + "\n"


def alias_index(modules: Mapping[str, Module]) -> str:
    """Return modules.alias: each hardware name that one of `modules` answers to."""
    lines = [f"alias {alias} {module.name}" for module in modules.values() for alias in module.aliases]
    return "\n".join(lines) + "\n"


def _closure(module: Module, modules: Mapping[str, Module]) -> list[str]:
    """Return all that `module` needs, each before what it needs itself, as modules.dep wants it."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in modules:
            return
        for need in modules[name].depends:
            visit(need)
        order.append(name)

    for need in module.depends:
        visit(need)
    return order[::-1]
