"""Virtual CPUs: count, topology, features, placement."""

from __future__ import annotations

import enum

import msgspec

from cloudvmm.config.number import U8, U16, U32


class CoreScheduling(enum.Enum):
    VM = "Vm"
    VCPU = "Vcpu"
    OFF = "Off"


class CpuProfile(enum.Enum):
    HOST = "Host"


class CpuTopology(msgspec.Struct, kw_only=True):
    threads_per_core: U16
    cores_per_die: U16
    dies_per_package: U16
    packages: U16


class CpuAffinity(msgspec.Struct, kw_only=True):
    vcpu: U32
    host_cpus: list[U32]


class CpuFeatures(msgspec.Struct, kw_only=True):
    amx: bool = False


class CpusConfig(msgspec.Struct, kw_only=True):
    boot_vcpus: U32
    max_vcpus: U32
    topology: CpuTopology | None = None
    kvm_hyperv: bool = False
    max_phys_bits: U8 = 46
    affinity: list[CpuAffinity] | None = None
    features: CpuFeatures = msgspec.field(default_factory=CpuFeatures)
    nested: bool = True
    core_scheduling: CoreScheduling = CoreScheduling.VM
    profile: CpuProfile = CpuProfile.HOST
