"""Plain values for what a server needs before its first answer.

Everywhere else a value is a `msgspec.Struct`; importing that alone takes twice as long as starting Python.
"""

from __future__ import annotations


class Value:
    """What is in `__slots__`, in the order of the constructor, and never changed.

    Two are equal that are of one kind and hold the same.
    """

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._held() == self._held()

    def __hash__(self) -> int:
        return hash(self._held())

    def __repr__(self) -> str:
        held = (f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"{type(self).__name__}({', '.join(held)})"

    def _held(self) -> tuple[object, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)
