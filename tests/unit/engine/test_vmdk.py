"""The text of a flat VMDK: what is one, and which extents it has. What is none is raw data."""

from __future__ import annotations

import os

import pytest

from cloudvmm.config.disk import ImageType
from cloudvmm.engine.image import detect
from cloudvmm.engine.vmdk import VmdkExtent, flat_extents

HEAD = "# Disk DescriptorFile\nversion=1\n"
FLAT = HEAD + 'createType="monolithicFlat"\n\n# Extent description\n'
END = "# The Disk Data Base\n"


def test_extents_are_read_in_order():
    text = FLAT + 'RW 4 FLAT "a-flat.vmdk" 0\n\nRDONLY 2 FLAT b 8\n' + END + "anything"
    assert flat_extents(text) == [VmdkExtent("RW", 4, "a-flat.vmdk", 0), VmdkExtent("RDONLY", 2, "b", 8)]


@pytest.mark.parametrize(
    "text",
    [
        FLAT.replace("monolithicFlat", "twoGbMaxExtentFlat") + "#DDB\n",
        FLAT.replace('"', "").replace("\n", "\r\n"),
        FLAT.replace("createType=", "createType = "),
        FLAT + END,
    ],
)
def test_other_forms_of_a_flat_vmdk_are_known(text):
    assert flat_extents(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# Disk Descriptor\n",
        HEAD,
        HEAD + "# Extent description\n" + END,
        FLAT.replace("monolithicFlat", "monolithicSparse") + END,
        FLAT.replace("createType", "createType=x"),
        FLAT.replace("# Extent description", "# Extents") + END,
        FLAT + "# Another comment\n",
        FLAT + "RW 4 SPARSE a\n" + END,
        FLAT + "RW 4 FLAT\n" + END,
        FLAT + "RW 4 FLAT a 0 1\n" + END,
        FLAT + "XX 4 FLAT a\n" + END,
        FLAT + "RW -4 FLAT a\n" + END,
        FLAT + "RW four FLAT a\n" + END,
        FLAT + "RW 4 FLAT a 18446744073709551616\n" + END,
    ],
)
def test_what_is_no_flat_vmdk_has_no_extents(text):
    assert flat_extents(text) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (FLAT.encode(), ImageType.FLAT_VMDK),
        (HEAD.encode(), ImageType.RAW),
        (FLAT.encode() + b"\xff", ImageType.RAW),
        (FLAT.encode() + bytes(2 << 20), ImageType.RAW),
    ],
)
def test_image_is_a_vmdk_only_where_all_of_it_is_such_a_text(tmp_path, content, expected):
    path = tmp_path / "image"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert detect(fd, len(content)) is expected
    finally:
        os.close(fd)
