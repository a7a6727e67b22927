"""`--cpus`."""

from __future__ import annotations

from cloudvmm.config.cpu import CoreScheduling, CpuAffinity, CpuFeatures, CpuProfile, CpusConfig
from cloudvmm.options.error import InvalidCpuFeatures
from cloudvmm.options.schema import Key, Schema
from cloudvmm.options.value import (
    STRING_LIST,
    TOGGLE,
    TOPOLOGY,
    U8,
    U32,
    choice,
    parse_integer,
    parse_integer_list,
    tuple_list,
)

_AFFINITY = tuple_list(
    lambda text: parse_integer(text, 0, 0xFFFF_FFFF),
    lambda text: parse_integer_list(text, 64),
    syntax="[<vcpu>@[<host_cpus>]]",
)

CPUS = Schema(
    "--cpus",
    Key("boot", U32, member="boot_vcpus", default=1),
    Key("max", U32, member="max_vcpus"),
    Key("topology", TOPOLOGY),
    Key("kvm_hyperv", TOGGLE),
    Key("max_phys_bits", U8),
    Key("affinity", _AFFINITY),
    Key("profile", choice({"Host": CpuProfile.HOST}, is_exact=True)),
    Key("features", STRING_LIST),
    Key("nested", TOGGLE),
    Key(
        "core_scheduling",
        choice({"vm": CoreScheduling.VM, "vcpu": CoreScheduling.VCPU, "off": CoreScheduling.OFF}),
    ),
)


def parse_cpus(text: str) -> CpusConfig:
    """:raises OptionError: when `text` is not what `--cpus` takes."""
    members = CPUS.members(text)
    members.setdefault("max_vcpus", members["boot_vcpus"])
    members["features"] = _features(members.get("features", []))
    if "affinity" in members:
        members["affinity"] = [
            CpuAffinity(vcpu=vcpu, host_cpus=host_cpus) for vcpu, host_cpus in members["affinity"]
        ]
    return CpusConfig(**members)


def _features(names: list[str]) -> CpuFeatures:
    for name in names:
        if name != "amx":
            raise InvalidCpuFeatures(name)
    return CpuFeatures(amx=bool(names))
