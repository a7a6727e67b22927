"""The partition table of the root disk."""

import struct

import pytest

from cloudvmm.guest.disk import master_boot_record


def test_partition_entry_says_where_and_how_large():
    sector = master_boot_record(start_bytes=1 << 20, size_bytes=63 << 20)

    boot, _, kind, _, start, sectors = struct.unpack_from("<B3sB3sII", sector, 446)
    assert (boot, kind, start, sectors) == (0, 0x83, 2048, 63 * 2048)
    assert sector[510:] == b"\x55\xaa"
    assert len(sector) == 512


def test_other_partition_entries_are_empty():
    sector = master_boot_record(start_bytes=1 << 20, size_bytes=1 << 20)

    assert sector[462:510] == b"\0" * 48


@pytest.mark.parametrize(
    ("start_bytes", "size_bytes"),
    [(1000, 512), (512, 1000), (0, 512), (512, 0), (512 << 32, 512), (512, 512 << 32)],
)
def test_partition_that_the_table_cannot_say_is_refused(start_bytes, size_bytes):
    with pytest.raises(ValueError, match="does not fit the table"):
        master_boot_record(start_bytes=start_bytes, size_bytes=size_bytes)
