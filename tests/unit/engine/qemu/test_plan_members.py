"""Whether the golden cases leave no member of any struct out: each is somewhere else than at its default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from msgspec import inspect

from cloudvmm.config.console import ConsoleConfig
from cloudvmm.config.cpu import CpusConfig
from cloudvmm.config.device import (
    FsConfig,
    GenericVhostUserConfig,
    IvshmemConfig,
    RtcConfig,
    UserDeviceConfig,
)
from cloudvmm.config.landlock import LandlockConfig
from cloudvmm.config.memory import MemoryConfig
from cloudvmm.config.numa import NumaConfig
from cloudvmm.config.payload import FwCfgConfig, FwCfgItem, FwCfgItemList
from cloudvmm.config.vm import VmConfig

GOLDEN: Final = Path(__file__).parent / "golden"

REFUSED_AS_A_WHOLE: Final = "the engine refuses whatever has such a struct"
REFUSED_BY_A_RULE: Final = "a rule of the configuration refuses it, so that no engine sees it"
# What no argument and no command is made of, and why.
EXCEPTIONS: Final[dict[type[msgspec.Struct], dict[str, str]]] = {
    VmConfig: {
        **dict.fromkeys(("landlock_enable", "landlock_rules"), "control holds the threads to it"),
        "gdb": "the guest is not let go at its boot",
    },
    LandlockConfig: dict.fromkeys(("path", "access"), REFUSED_AS_A_WHOLE),
    CpusConfig: {
        "core_scheduling": "set for the threads: test_vcpu.py",
        "profile": "QEMU has no such setting",
    },
    MemoryConfig: {"thp": "set for the process, not by an argument: test_process.py"},
    ConsoleConfig: {"socket": REFUSED_BY_A_RULE},
    FsConfig: {"iommu": REFUSED_BY_A_RULE},
    GenericVhostUserConfig: {"iommu": REFUSED_BY_A_RULE},
    UserDeviceConfig: {"iommu": REFUSED_BY_A_RULE},
    IvshmemConfig: {"iommu": REFUSED_BY_A_RULE},
    NumaConfig: {"pci_segments": "there is one segment"},
    RtcConfig: dict.fromkeys(("id", "iommu", "pci_segment", "pci_device_id"), REFUSED_AS_A_WHOLE),
    FwCfgConfig: dict.fromkeys(FwCfgConfig.__struct_fields__, REFUSED_AS_A_WHOLE),
    FwCfgItemList: dict.fromkeys(FwCfgItemList.__struct_fields__, REFUSED_AS_A_WHOLE),
    FwCfgItem: dict.fromkeys(FwCfgItem.__struct_fields__, REFUSED_AS_A_WHOLE),
}

Member = tuple[type[msgspec.Struct], str]


class Configured(msgspec.Struct):
    """What is read of a golden case here."""

    config: VmConfig


def structs_in(kind: inspect.Type, found: set[type[msgspec.Struct]]) -> None:
    """Add every struct that a value of `kind` can hold to `found`."""
    match kind:
        case inspect.StructType(cls=cls, fields=fields):
            if cls not in found:
                found.add(cls)
                for field in fields:
                    structs_in(field.type, found)
        case inspect.UnionType(types=kinds):
            for each in kinds:
                structs_in(each, found)
        case inspect.ListType(item_type=item) | inspect.DictType(value_type=item):
            structs_in(item, found)


def changed_in(value: Any) -> Iterator[Member]:
    """Give every member in `value` that is not at its default; one without a default is not, ever."""
    if isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            member = getattr(value, field.name)
            if member != (field.default_factory() if callable(field.default_factory) else field.default):
                yield type(value), field.name
            yield from changed_in(member)
    elif isinstance(value, list):
        for each in value:
            yield from changed_in(each)


@pytest.fixture(scope="module")
def changed() -> set[Member]:
    configs = [
        msgspec.json.decode(path.read_bytes(), type=Configured).config for path in GOLDEN.glob("*.json")
    ]
    return {member for config in configs for member in changed_in(config)}


def all_structs() -> list[type[msgspec.Struct]]:
    found: set[type[msgspec.Struct]] = set()
    structs_in(inspect.type_info(VmConfig), found)
    return sorted(found, key=lambda each: each.__name__)


@pytest.mark.parametrize("struct", all_structs(), ids=lambda each: each.__name__)
def test_every_member_is_in_a_golden_case_or_its_absence_has_a_reason(struct, changed):
    absent = {name for name in struct.__struct_fields__ if (struct, name) not in changed}
    assert absent == set(EXCEPTIONS.get(struct, ()))
