"""Identifiers that users give: unique over devices, memory zones and rate-limit groups."""

from __future__ import annotations

from cloudvmm.config.error import IdentifierNotUnique, InvalidIdentifier

RESERVED_PREFIX = "__"


def claim_identifier(claimed: set[str], identifier: str | None) -> None:
    """Add `identifier`, if there is one, to `claimed`.

    :raises InvalidIdentifier: when it could be mistaken for one of the VMM's own.
    :raises IdentifierNotUnique: when it is taken already.
    """
    if identifier is None:
        return
    if identifier.startswith(RESERVED_PREFIX):
        raise InvalidIdentifier(identifier)
    if identifier in claimed:
        raise IdentifierNotUnique(identifier)
    claimed.add(identifier)
