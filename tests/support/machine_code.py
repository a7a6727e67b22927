"""Programs of a few bytes, for a guest that has no tool for the purpose. x86 only."""

from __future__ import annotations

import struct
from pathlib import Path

BOOT_SECTOR_BYTES = 512
LOAD_ADDRESS = 0x400000
COM1, DEBUG_PORT = 0x3F8, 0xE9


def port_writer(port: int) -> bytes:
    """Return a Linux program that writes each byte of its standard input to the I/O `port`.

    Its exit status is 0 only if it was allowed to.
    """
    code = b"".join(
        (
            b"\xbf\x03\x00\x00\x00",  # mov edi, 3
            b"\xb8\xac\x00\x00\x00",  # mov eax, iopl
            b"\x0f\x05",  # syscall
            b"\x85\xc0\x75\x1c",  # test eax, eax; jnz end
            b"\x31\xff\x48\x89\xe6",  # next: xor edi, edi; mov rsi, rsp
            b"\xba\x01\x00\x00\x00",  # mov edx, 1
            b"\x31\xc0\x0f\x05",  # xor eax, eax (read); syscall
            b"\x85\xc0\x7e\x0a",  # test eax, eax; jle end
            b"\x66\xba" + struct.pack("<H", port),  # mov dx, port
            b"\x8a\x06\xee\xeb\xe5",  # mov al, [rsi]; out dx, al; jmp next
            b"\x90",
            b"\x89\xc7",  # end: mov edi, eax
            b"\xb8\x3c\x00\x00\x00\x0f\x05",  # mov eax, exit; syscall
        )
    )
    header_bytes = 64 + 56
    size = header_bytes + len(code)
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(2, 62, 1, LOAD_ADDRESS + header_bytes, 64, 0, 0),
        *(64, 56, 1, 64, 0, 0),
    )
    program = struct.pack("<IIQQQQQQ", 1, 5, 0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 4096)
    return elf + program + code


def printing_boot_sector(text: bytes) -> bytes:
    """Return a boot sector that writes `text` to the first serial port and to port 0xe9, and halts."""
    code = b"".join(
        (
            # cli: else SeaBIOS writes the rest of its own words in between, when its timer fires.
            b"\xfa\xfc\x31\xc0\x8e\xd8",  # cli; cld; xor ax, ax; mov ds, ax
            b"\xbe\x19\x7c",  # mov si, text
            b"\xac\x84\xc0\x74\x08",  # next: lodsb; test al, al; jz halt
            b"\xba" + struct.pack("<H", COM1) + b"\xee",  # mov dx, 0x3f8; out dx, al
            b"\xe6" + bytes([DEBUG_PORT]),  # out 0xe9, al
            b"\xeb\xf3",  # jmp next
            b"\xf4\xeb\xfd",  # halt: hlt; jmp halt
        )
    )
    assert len(code) == 0x19
    sector = code + text + b"\0"
    return sector.ljust(BOOT_SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def counting_boot_sector(count: int) -> bytes:
    """Return a boot sector that writes the numbers below `count`, four bytes each, to COM1 and port 0xe9.

    It waits until COM1 takes a byte, as a driver does.
    """
    send_byte = b"".join(
        (
            b"\x66\x50",  # push eax
            b"\xba" + struct.pack("<H", COM1 + 5),  # mov dx, its line status
            b"\xec\xa8\x20\x74\xfb",  # wait: in al, dx; test al, 0x20; jz wait
            b"\x66\x58",  # pop eax
            b"\xba" + struct.pack("<H", COM1) + b"\xee",  # mov dx, its data; out dx, al
            b"\xba" + struct.pack("<H", DEBUG_PORT) + b"\xee",  # mov dx, port; out dx, al
            b"\x66\xc1\xe8\x08",  # shr eax, 8
        )
    )
    number = b"\x66\x89\xd8\xb9\x04\x00" + _repeat(b"\xe2", send_byte)  # mov eax, ebx; mov cx, 4; loop
    count_on = b"\x66\x43\x66\x81\xfb" + struct.pack("<I", count)  # inc ebx; cmp ebx, count
    # cli: as above.
    code = b"\xfa\x66\x31\xdb" + _repeat(b"\x72", number + count_on) + b"\xfa\xf4"  # xor ebx, ebx; jb; hlt
    return code.ljust(BOOT_SECTOR_BYTES - 2, b"\0") + b"\x55\xaa"


def counted(count: int) -> bytes:
    """Return what a `counting_boot_sector` writes."""
    return struct.pack(f"<{count}I", *range(count))


def _repeat(jump: bytes, code: bytes) -> bytes:
    """Return `code` and the short `jump` back to its start."""
    return code + jump + struct.pack("b", -len(code) - 2)


def boot_disk(path: Path) -> Path:
    """Make a disk whose boot sector says "hello" on the serial port and the debug port, and halts."""
    path.write_bytes(printing_boot_sector(b"hello\n").ljust(1 << 20, b"\0"))
    return path
