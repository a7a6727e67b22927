"""Whether a QMP command is one that QEMU knows, by the schema QEMU reports about itself.

For tests: each message that the engine sends is held against the answer to ``query-qmp-schema``, so that
a typing error in a rare branch, or a member that an older QEMU lacks, shows without that branch being hit
on each version.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_INTEGER_TYPES = frozenset({"int", "number"})


class QmpSchema:
    """`entries` is what ``query-qmp-schema`` returns."""

    def __init__(self, entries: Iterable[dict[str, Any]]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    def complaints(self, command: str, arguments: dict[str, Any]) -> list[str]:
        """Return what is wrong with the call, each with its place; empty where it is right."""
        entry = self._entries.get(command)
        if entry is None or entry["meta-type"] != "command":
            return [f"{command}: no such command"]
        return list(self._check(entry["arg-type"], arguments, command))

    def _check(self, type_name: str, value: Any, where: str) -> Iterable[str]:
        entry = self._entries[type_name]
        match entry["meta-type"]:
            case "object":
                yield from self._check_object(entry, value, where)
            case "array":
                if not isinstance(value, list):
                    yield f"{where}: not an array"
                else:
                    for index, item in enumerate(value):
                        yield from self._check(entry["element-type"], item, f"{where}[{index}]")
            case "enum":
                if value not in [member["name"] for member in entry["members"]]:
                    yield f"{where}: {value!r} is not one of its values"
            case "alternate":
                branches = [list(self._check(member["type"], value, where)) for member in entry["members"]]
                if all(branches):
                    yield f"{where}: no alternative fits"
            case _:
                if not _is_builtin(entry["json-type"], value):
                    yield f"{where}: not of type {entry['json-type']}"

    def _check_object(self, entry: dict[str, Any], value: Any, where: str) -> Iterable[str]:
        if not isinstance(value, dict):
            yield f"{where}: not an object"
            return
        members = {member["name"]: member for member in self._members(entry, value)}
        for name, member in members.items():
            if name in value:
                yield from self._check(member["type"], value[name], f"{where}.{name}")
            elif "default" not in member:
                yield f"{where}.{name}: missing"
        yield from (f"{where}.{name}: no such member" for name in value if name not in members)

    def _members(self, entry: dict[str, Any], value: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Give the members of the object, those of the variant that `value` chooses included."""
        yield from entry["members"]
        for variant in entry.get("variants", []):
            if variant["case"] == value.get(entry["tag"]):
                yield from self._members(self._entries[variant["type"]], value)


def _is_builtin(json_type: str, value: Any) -> bool:
    if json_type in _INTEGER_TYPES:
        return isinstance(value, int | float) and not isinstance(value, bool)
    kinds: dict[str, type] = {"string": str, "boolean": bool, "null": type(None)}
    return json_type == "value" or isinstance(value, kinds[json_type])
