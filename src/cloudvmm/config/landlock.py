"""Landlock rules that a user adds to those the VM needs."""

from __future__ import annotations

import os

import msgspec

from cloudvmm.config.error import ValidationError


class LandlockConfig(msgspec.Struct, kw_only=True):
    path: str
    access: str


class LandlockPathDoesNotExist(ValidationError):
    def __init__(self, path: str) -> None:
        super().__init__(f'Path "{path}" provided in landlock-rules does not exist')


class InvalidLandlockAccess(ValidationError):
    def __init__(self, why: str) -> None:
        super().__init__(f"Invalid landlock access: Invalid Landlock access: {why}")


def check_landlock_rule(rule: LandlockConfig) -> None:
    if not os.path.exists(rule.path):
        raise LandlockPathDoesNotExist(rule.path)
    check_landlock_access(rule)


def check_landlock_access(rule: LandlockConfig) -> None:
    if not rule.access:
        raise InvalidLandlockAccess("Access cannot be empty")
    for letter in rule.access:
        if letter not in "rw":
            raise InvalidLandlockAccess(f"Invalid access: {letter}")
