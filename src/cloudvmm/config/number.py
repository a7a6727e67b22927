"""Integers as the wire has them: out of range is a decoding error, never a wrapped value."""

from __future__ import annotations

from typing import Annotated

import msgspec

U8 = Annotated[int, msgspec.Meta(ge=0, le=0xFF)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
# msgspec's bounds are signed 64-bit; `form.decode` refuses what lies above 2**64 - 1.
U64 = Annotated[int, msgspec.Meta(ge=0)]
I32 = Annotated[int, msgspec.Meta(ge=-0x8000_0000, le=0x7FFF_FFFF)]
# Of memory: more than any machine can address, and still a number of 64 bits when many are added up.
ByteCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 56)]

U64_MAX = 2**64 - 1
MIB = 1 << 20
GIB = 1 << 30
