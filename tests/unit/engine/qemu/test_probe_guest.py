"""The bytes of the probe guest are what its listing says."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest

from cloudvmm.engine.qemu.probe_guest import IMAGE_BYTES, LISTING, STAGES, code_lines, firmware_image


def test_offsets_follow_each_other_without_gap():
    for (offset, code), (following, _) in itertools.pairwise(code_lines()):
        assert offset + len(code) == following


def test_image_is_one_block_that_starts_at_the_reset_vector():
    image = firmware_image()

    assert len(image) == IMAGE_BYTES
    assert image[0xFFF0:0xFFF5] == bytes.fromhex("ea000000f0")
    assert image[:1] == b"\xfa"


def test_every_stage_of_the_listing_has_a_name():
    assert [letter for letter in STAGES if f"mov $'{letter}', %al" not in LISTING] == []
    assert LISTING.count("# stage: ") == len(STAGES)


def test_source_assembles_to_the_bytes_beside_it(tmp_path):
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("The GNU assembler (package binutils) is missing")
    source, built, raw = tmp_path / "probe.S", tmp_path / "probe.o", tmp_path / "probe.bin"
    source.write_text("".join(f"{line[28:]}\n" for line in LISTING.splitlines()))
    subprocess.run(["as", "-o", built, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", built, raw], check=True)

    assert raw.read_bytes() == b"".join(code for _, code in code_lines())
