"""Choosing kernel modules and writing the indexes that modprobe reads."""

import lzma

import pytest

from cloudvmm.guest.module import alias_index, dependency_index, module_name, read_modinfo, select


def modinfo(**fields: str) -> bytes:
    """Make what a module file looks like around its .modinfo section."""
    return b"\x7fELF\0" + b"".join(f"{key}={value}\0".encode() for key, value in fields.items()) + b"\0rest"


@pytest.fixture
def root(tmp_path):
    files = {
        "kernel/ring.ko": modinfo(license="GPL", depends="", name="ring"),
        "kernel/bus.ko": modinfo(depends="ring"),
        "kernel/my-disk.ko": modinfo(alias="virtio:d00000002v*", depends="ring,bus"),
        "kernel/other.ko": modinfo(depends="ring"),
    }
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    return tmp_path


def files_of(root):
    return {module_name(str(path)): path for path in root.rglob("*.ko*")}


def test_modinfo_gives_dependencies_and_all_aliases():
    content = b"\0alias=pci:a*\0alias=pci:b*\0depends=virtio-ring,virtio\0softdep=pre: x\0"

    module = read_modinfo("kernel/virtio-x.ko", content)

    assert module.name == "virtio_x"
    assert module.depends == ("virtio_ring", "virtio")
    assert module.aliases == ("pci:a*", "pci:b*")
    assert module.softdeps == ("pre: x",)


def test_selection_brings_what_the_wanted_modules_need_and_no_more(root):
    chosen = select(files_of(root), root=root, wanted=["my_disk", "not_in_this_kernel"])

    assert list(chosen) == ["bus", "my_disk", "ring"]


def test_dependencies_come_with_the_deepest_last(root):
    chosen = select(files_of(root), root=root, wanted=["my_disk"])

    index = dependency_index({name: module for name, (module, _) in chosen.items()})

    assert index.splitlines() == [
        "kernel/bus.ko: kernel/ring.ko",
        "kernel/my-disk.ko: kernel/bus.ko kernel/ring.ko",
        "kernel/ring.ko:",
    ]


def test_alias_index_names_the_module_as_the_kernel_does(root):
    chosen = select(files_of(root), root=root, wanted=["my_disk"])

    index = alias_index({name: module for name, (module, _) in chosen.items()})

    assert index == "alias virtio:d00000002v* my_disk\n"


def test_compressed_module_comes_out_plain_under_its_plain_name(tmp_path):
    (tmp_path / "a.ko.xz").write_bytes(lzma.compress(modinfo(depends="")))

    ((module, content),) = select(files_of(tmp_path), root=tmp_path, wanted=["a"]).values()

    assert module.path == "a.ko"
    assert content == modinfo(depends="")
