"""The guest's memory, as the front end shares it: regions of files that are mapped here.

Nothing outside a region can be reached: every access goes through `pieces` or `at_user`, which check it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import msgspec

from cloudvmm.vhost.error import MemoryUnknown, ProtocolBroken


class Place(msgspec.Struct, frozen=True):
    """Where a region is: for the guest, in the front end, and in its file. All in bytes."""

    guest: int
    size: int
    user: int
    offset: int


class Region:
    """A part of a file that is mapped. Owns the mapping."""

    __slots__ = ("_mapping", "guest", "guest_end", "place", "user", "user_end", "view")

    def __init__(self, place: Place, fd: int) -> None:
        """Map it; `fd` is lent. Of a file that may only be read, nothing can be reached.

        :raises ProtocolBroken: the file has no such part.
        """
        self.place = place
        self.guest = self.guest_end = place.guest
        self.user = self.user_end = place.user
        self.view = memoryview(b"")
        self._mapping: mmap.mmap | None = None
        try:
            # The whole file: a part of one of huge pages could not be unmapped again.
            self._mapping = mmap.mmap(fd, 0)
        except PermissionError:
            return
        except (OSError, ValueError) as error:
            raise ProtocolBroken("A memory region cannot be mapped") from error
        if not place.size or place.offset + place.size > len(self._mapping):
            self._mapping.close()
            raise ProtocolBroken("A memory region is larger than its file")
        self.guest_end += place.size
        self.user_end += place.size
        with memoryview(self._mapping) as whole:
            self.view = whole[place.offset : place.offset + place.size]

    def close(self) -> None:
        """Unmap it. Whoever has a piece of it must have let go."""
        self.view.release()
        if self._mapping is not None:
            self._mapping.close()


class Memory:
    """The regions there are. Owns them."""

    def __init__(self) -> None:
        self._regions: list[Region] = []

    def replace(self, places: Sequence[Place], fds: Sequence[int]) -> None:
        """Have these regions and no others; `fds` are lent. All pieces must have been let go of.

        :raises ProtocolBroken: one cannot be mapped; there are none then.
        """
        self.close()
        if len(places) != len(fds):
            raise ProtocolBroken(f"{len(places)} memory regions come with {len(fds)} descriptors")
        for place, fd in zip(places, fds, strict=True):
            self.add(place, fd)

    def add(self, place: Place, fd: int) -> None:
        """Have one more; `fd` is lent.

        :raises ProtocolBroken: it cannot be mapped, or lies across another.
        """
        if any(
            each.guest < place.guest + place.size and place.guest < each.guest_end for each in self._regions
        ):
            raise ProtocolBroken("Two memory regions lie across each other")
        self._regions = [*self._regions, Region(place, fd)]

    def remove(self, place: Place) -> None:
        """Have it no longer; it is named by its two addresses and its size. Its pieces must be let go of.

        :raises ProtocolBroken: there is none.
        """
        for region in self._regions:
            if (region.guest, region.user, region.place.size) == (place.guest, place.user, place.size):
                self._regions = [each for each in self._regions if each is not region]
                region.close()
                return
        raise ProtocolBroken("There is no such memory region to remove")

    def pieces(self, address: int, size: int) -> list[memoryview]:
        """Return the memory at the guest's `address`: a piece of each region that it spans.

        :raises MemoryUnknown: some of it is not there.
        """
        if not size:
            return []
        for region in self._regions:
            if region.guest <= address and address + size <= region.guest_end:
                start = address - region.guest
                return [region.view[start : start + size]]
        return self._pieces_across(address, size)

    def at_user(self, address: int, size: int) -> memoryview:
        """Return the memory that the front end has at its own `address`.

        :raises MemoryUnknown: it is not in one region.
        """
        for region in self._regions:
            if region.user <= address and address + size <= region.user_end:
                start = address - region.user
                return region.view[start : start + size]
        raise MemoryUnknown(address, size)

    def close(self) -> None:
        """Unmap everything. Idempotent."""
        regions, self._regions = self._regions, []
        for region in regions:
            region.close()

    def _pieces_across(self, address: int, size: int) -> list[memoryview]:
        found: list[memoryview] = []
        at, end = address, address + size
        while at < end:
            region = next((each for each in self._regions if each.guest <= at < each.guest_end), None)
            if region is None:
                raise MemoryUnknown(address, size)
            upto = min(end, region.guest_end)
            found.append(region.view[at - region.guest : upto - region.guest])
            at = upto
        return found
