"""Disk images: what they are, and which files are opened for them."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest

from cloudvmm.config.disk import ImageType
from cloudvmm.engine.image import DiskOpenError, ImageTypeMismatch
from cloudvmm.engine.qemu.image import (
    BackingFilesDisabled,
    InvalidImage,
    open_image,
)
from cloudvmm.engine.vmdk import flat_extents
from cloudvmm.errors import error_chain, error_code
from support.leak import Holdings

MIB = 1 << 20
BACKING_FORMAT = 0xE2792ACA


def qcow2(*, base: str = "", base_format: str = "", incompatible: int = 0, encryption: int = 0) -> bytes:
    """Return the header of a version 3 image; enough for whoever only looks at headers."""
    extension = b""
    if base_format:
        padded = base_format.encode().ljust((len(base_format) + 7) // 8 * 8, b"\0")
        extension = struct.pack(">II", BACKING_FORMAT, len(base_format)) + padded
    extension += struct.pack(">II", 0, 0)
    name_at = 104 + len(extension) if base else 0
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", 3, name_at, len(base), 16, MIB, encryption)
    head = head.ljust(72, b"\0") + struct.pack(">QQQII", incompatible, 0, 0, 4, 104)
    return (head + extension + base.encode()).ljust(4096, b"\0")


def fixed_vhd(data_bytes: int, *, claimed: int | None = None) -> bytes:
    footer = bytearray(512)
    footer[:8] = b"conectix"
    footer[48:56] = (data_bytes if claimed is None else claimed).to_bytes(8)
    footer[60:64] = (2).to_bytes(4)
    return bytes(data_bytes) + bytes(footer)


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write_file


@pytest.fixture
def opened():
    """Open images that the test need not close; none may leak when the test has failed to open one."""
    images = []
    before = len(os.listdir("/proc/self/fd"))

    def open_it(path, *, readonly=False, direct=False, image_type=ImageType.UNKNOWN, backing_files=False):
        image = open_image(
            path, readonly=readonly, direct=direct, image_type=image_type, backing_files=backing_files
        )
        images.append(image)
        return image

    yield open_it
    for image in images:
        image.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bytes(MIB), ImageType.RAW),
        (b"", ImageType.RAW),
        (b"QFI", ImageType.RAW),
        (qcow2(), ImageType.QCOW2),
        (fixed_vhd(MIB), ImageType.FIXED_VHD),
        (b"vhdxfile" + bytes(MIB), ImageType.VHDX),
    ],
)
def test_type_is_detected_by_magic(write, opened, content, expected):
    assert opened(write("image", content)).image_type is expected


def test_declared_type_that_differs_is_refused_in_the_words_of_the_reference(write, opened):
    with pytest.raises(ImageTypeMismatch) as caught:
        opened(write("image", qcow2()), image_type=ImageType.RAW)
    assert str(caught.value) == (
        "Disk image type does not match expected type: specified = raw, detected = qcow2"
    )


def test_missing_file_is_named_by_the_cause(opened):
    with pytest.raises(DiskOpenError) as caught:
        opened("/no/such/image")
    assert error_chain(caught.value) == [
        "Cannot open disk path",
        "I/O error (path=/no/such/image op=open)",
        "No such file or directory (os error 2)",
    ]
    assert error_code(caught.value) == "DiskOpenError"


def test_path_that_no_file_can_have_is_named_by_the_cause(opened):
    with pytest.raises(DiskOpenError) as caught:
        opened("/no/\0/image")
    assert error_chain(caught.value)[1:] == ["I/O error (path=/no/\0/image op=open)", "embedded null byte"]


def test_folder_is_refused(tmp_path, opened):
    with pytest.raises(InvalidImage, match="neither a regular file nor a block device"):
        opened(str(tmp_path), readonly=True)


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path, opened):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidImage, match="neither a regular file nor a block device"):
        opened(str(tmp_path / "fifo"), readonly=True)


@pytest.mark.parametrize(("readonly", "access"), [(False, os.O_RDWR), (True, os.O_RDONLY)])
def test_access_follows_readonly(write, opened, readonly, access):
    image = opened(write("image", bytes(MIB)), readonly=readonly)
    flags = fcntl.fcntl(image.fd, fcntl.F_GETFL)
    assert flags & os.O_ACCMODE == access
    assert not flags & os.O_NONBLOCK
    assert not os.get_inheritable(image.fd)


def test_vhd_ends_before_its_footer(write, opened):
    image = opened(write("image", fixed_vhd(MIB)))
    assert (image.data_bytes, image.size_bytes) == (MIB, MIB + 512)


def test_vhd_larger_than_its_file_is_refused(write, opened):
    with pytest.raises(InvalidImage, match="size that the file does not have"):
        opened(write("image", fixed_vhd(MIB, claimed=2 * MIB)))


def vmdk(*extents, kind="monolithicFlat"):
    lines = "".join(f"{extent}\n" for extent in extents)
    return (
        f"# Disk DescriptorFile\nversion=1\ncreateType={kind}\n\n"
        f"# Extent description\n{lines}\n# The Disk Data Base\n#DDB\n"
    ).encode()


def test_extents_of_a_vmdk_are_opened_and_named_anew_for_qemu(write, opened, tmp_path):
    first, second = write("first", bytes(MIB)), write("second", bytes(MIB))
    text = vmdk('RW 2048 FLAT "first"', f'RW 1024 FLAT "{second}" 1024', kind='"twoGbMaxExtentFlat"')
    image = opened(write("image", text), image_type=ImageType.FLAT_VMDK)
    extents = image.extents
    assert [os.readlink(f"/proc/self/fd/{each.fd}") for each in extents.opened] == [first, second]
    told = flat_extents(os.pread(extents.text_fd, 4096, 0).decode())
    sets = [each.set_id for each in extents.opened]
    assert [(each.sectors, each.name, each.offset) for each in told] == [
        (2048, f"/dev/fdset/{sets[0]}", 0),
        (1024, f"/dev/fdset/{sets[1]}", 1024),
    ]
    assert sorted(image.fds()) == sorted([image.fd, *extents.data_fds, extents.text_fd])
    assert not any(os.get_inheritable(fd) for fd in image.fds())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (None, "lists no extents"),
        ('RW 0 FLAT "data"', "extent data has no size"),
        ('RW 2049 FLAT "data"', "extent data is too short"),
        ('RW 2048 FLAT "data" 1', "extent data is too short"),
        ('RDONLY 2048 FLAT "data"', "extent data is RDONLY"),
        ('NOACCESS 2048 FLAT "data"', "extent data is NOACCESS"),
        ('RW 2048 FLAT "."', None),
        ('RW 2048 FLAT "none"', None),
        ('RW 2048 FLAT "link"', None),
        ('RW 2048 FLAT "fifo"', "extent fifo is no regular file"),
        ('RW 2048 FLAT "with\0nul"', "has a NUL character"),
    ],
)
def test_vmdk_whose_extents_do_not_serve_is_refused_and_nothing_stays_open(
    write, opened, tmp_path, line, reason
):
    write("data", bytes(MIB))
    os.symlink("data", tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    before = Holdings()
    path = write("image", vmdk(*([] if line is None else [line])))
    with pytest.raises(DiskOpenError if reason is None else InvalidImage, match=reason):
        opened(path, image_type=ImageType.FLAT_VMDK)
    before.assert_nothing_added()


def test_readonly_vmdk_may_have_extents_that_are_only_read(write, opened):
    write("data", bytes(MIB))
    path = write("image", vmdk('RDONLY 2048 FLAT "data"'))
    image = opened(path, image_type=ImageType.FLAT_VMDK, readonly=True)
    assert fcntl.fcntl(image.extents.opened[0].fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_vmdk_of_undeclared_type_is_refused_because_a_guest_may_have_written_it(write, opened):
    write("data", bytes(MIB))
    with pytest.raises(InvalidImage, match="names other files, and its type was not given"):
        opened(write("image", vmdk('RW 2048 FLAT "data"')))


def test_vmdk_below_a_qcow2_is_refused(write, opened):
    base = write("base", vmdk('RW 2048 FLAT "data"'))
    with pytest.raises(InvalidImage, match="is a vmdk"):
        opened(write("top", qcow2(base=base)), image_type=ImageType.QCOW2, backing_files=True)


def test_backing_file_is_refused_unless_allowed(write, opened):
    base = write("base", bytes(MIB))
    with pytest.raises(BackingFilesDisabled, match=base):
        opened(write("top", qcow2(base=base, base_format="raw")), image_type=ImageType.QCOW2)


def test_backing_file_of_an_image_of_undeclared_type_is_refused(write, opened):
    base = write("base", bytes(MIB))
    with pytest.raises(BackingFilesDisabled):
        opened(write("top", qcow2(base=base, base_format="raw")), backing_files=True)


def test_chain_is_opened_read_only_below_the_top_and_relative_to_it(write, opened):
    write("base", bytes(MIB))
    write("middle", qcow2(base="base", base_format="raw"))
    top = opened(
        write("top", qcow2(base="middle", base_format="qcow2")),
        image_type=ImageType.QCOW2,
        backing_files=True,
    )
    assert [image.image_type for image in top.chain()] == [ImageType.QCOW2, ImageType.QCOW2, ImageType.RAW]
    assert [image.readonly for image in top.chain()] == [False, True, True]


def test_raw_backing_format_is_believed_over_what_its_content_looks_like(write, opened):
    write("base", qcow2(base="/etc/passwd", base_format="raw"))
    top = opened(
        write("top", qcow2(base="base", base_format="raw")), image_type=ImageType.QCOW2, backing_files=True
    )
    assert [image.image_type for image in top.chain()] == [ImageType.QCOW2, ImageType.RAW]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (qcow2(incompatible=4), "its data lies in another file"),
        (qcow2(encryption=1), "it is encrypted"),
        (qcow2()[:40], "its header is cut off"),
        (qcow2(base="nbd://host/x"), "is not a file"),
        (qcow2(base="json:{}"), "is not a file"),
        (qcow2(base="self"), "longer than"),
        (qcow2()[:8] + (1 << 40).to_bytes(8) + (5).to_bytes(4) + qcow2()[20:], "outside its header"),
    ],
)
def test_header_that_cannot_be_used_is_refused_with_the_reason(write, opened, content, reason):
    with pytest.raises(InvalidImage, match=reason):
        opened(write("self", content), image_type=ImageType.QCOW2, backing_files=True)


@pytest.fixture
def large_sectors(monkeypatch):
    """Storage with sectors of 4096 bytes: what bypasses the page cache must read whole ones."""
    read = os.pread

    def read_strictly(fd: int, length: int, offset: int) -> bytes:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT and (length % 4096 or offset % 4096):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return read(fd, length, offset)

    monkeypatch.setattr(os, "pread", read_strictly)


@pytest.mark.usefixtures("large_sectors")
def test_direct_image_on_large_sectors_is_looked_at_all_the_same(opened, write):
    write("base", qcow2())
    path = write("top", qcow2(base="base", base_format=""))
    image = opened(path, direct=True, image_type=ImageType.QCOW2, backing_files=True)

    assert [each.image_type for each in image.chain()] == [ImageType.QCOW2, ImageType.QCOW2]
    assert all(fcntl.fcntl(each.fd, fcntl.F_GETFL) & os.O_DIRECT for each in image.chain())


@pytest.mark.usefixtures("large_sectors")
def test_direct_vhd_on_large_sectors_is_recognised(opened, write):
    image = opened(write("image", fixed_vhd(MIB)), direct=True)

    assert (image.image_type, image.data_bytes) == (ImageType.FIXED_VHD, MIB)
