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
    ValueType,
    choice,
    integer_list,
    tuple_list,
)


def _parse_features(text: str) -> CpuFeatures:
    names = STRING_LIST.parse(text)
    for name in names:
        if name != "amx":
            raise InvalidCpuFeatures(name)
    return CpuFeatures(amx=bool(names))


_FEATURES: ValueType[CpuFeatures] = ValueType(
    _parse_features, lambda features: "amx" if features.amx else "", syntax="[amx]", choices=("amx",)
)
_AFFINITY = tuple_list(
    U32,
    integer_list(64),
    make=lambda vcpu, host_cpus: CpuAffinity(vcpu=vcpu, host_cpus=host_cpus),
    split=lambda affinity: (affinity.vcpu, affinity.host_cpus),
    syntax="[<vcpu>@[<host_cpus>]]",
)

CPUS = Schema(
    "--cpus",
    CpusConfig,
    Key("boot", U32, "vCPUs present at boot", member="boot_vcpus", default=1),
    Key(
        "max",
        U32,
        "vCPUs that there can be after hotplug; as many as at boot if not given",
        member="max_vcpus",
    ),
    Key("topology", TOPOLOGY, "Threads, cores, dies and packages; their product is the maximum"),
    Key("kvm_hyperv", TOGGLE, "Whether to offer Hyper-V's enlightenments"),
    Key("max_phys_bits", U8, "Bits of a guest's physical address at most"),
    Key("affinity", _AFFINITY, "Host CPUs that the thread of each vCPU may run on"),
    Key("profile", choice({"Host": CpuProfile.HOST}, is_exact=True), "What the vCPUs look like"),
    Key("features", _FEATURES, "Features that have to be asked for"),
    Key("nested", TOGGLE, "Whether the guest can run guests of its own"),
    Key(
        "core_scheduling",
        choice({"vm": CoreScheduling.VM, "vcpu": CoreScheduling.VCPU, "off": CoreScheduling.OFF}),
        "Who may share a core: vCPUs of the VM, none, or anything",
    ),
)


def parse_cpus(text: str) -> CpusConfig:
    """:raises OptionError: when `text` is not what `--cpus` takes."""
    members = CPUS.members(text)
    members.setdefault("max_vcpus", members["boot_vcpus"])
    return CpusConfig(**members)


def format_cpus(cpus: CpusConfig) -> str:
    """:raises Unprintable: no `--cpus` gives `cpus`."""
    max_vcpus = None if cpus.max_vcpus == cpus.boot_vcpus else cpus.max_vcpus
    return CPUS.format(cpus, parse_cpus, max_vcpus=max_vcpus)
