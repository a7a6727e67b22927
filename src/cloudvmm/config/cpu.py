"""Virtual CPUs: count, topology, features, placement."""

from __future__ import annotations

import enum
import os

import msgspec

from cloudvmm.config.error import ValidationError
from cloudvmm.config.number import U8, U16, U32, U64


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
    host_cpus: list[U64]


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


class CpusMaxLowerThanBoot(ValidationError):
    def __init__(self, max_vcpus: int, boot_vcpus: int) -> None:
        super().__init__(f"Max CPUs ({max_vcpus}) lower than boot CPUs ({boot_vcpus})")


class TooManyCpus(ValidationError):
    def __init__(self, max_vcpus: int, limit: int) -> None:
        super().__init__(f"Too many CPUs: specified {max_vcpus} but {limit} is the limit")


class CpuTopologyZeroPart(ValidationError):
    """No part of the CPU topology can be zero"""


class CpuTopologyThreadsPerCore(ValidationError):
    """CPU topology supports at most 2 threads per core"""


class CpuTopologyDiesPerPackage(ValidationError):
    """Dies per package must be 1"""


class CpuTopologyCount(ValidationError):
    """Product of CPU topology parts does not match maximum vCPU"""


def check_vcpu_count(cpus: CpusConfig) -> None:
    if cpus.max_vcpus < cpus.boot_vcpus:
        raise CpusMaxLowerThanBoot(cpus.max_vcpus, cpus.boot_vcpus)
    limit = 8192 if _machine() == "x86_64" else 255
    if cpus.max_vcpus > limit:
        raise TooManyCpus(cpus.max_vcpus, limit)


def check_topology(cpus: CpusConfig) -> None:
    topology = cpus.topology
    if topology is None:
        return
    threads, cores = topology.threads_per_core, topology.cores_per_die
    dies, packages = topology.dies_per_package, topology.packages
    if 0 in (threads, cores, dies, packages):
        raise CpuTopologyZeroPart
    if threads > 2 and _machine() == "x86_64":
        raise CpuTopologyThreadsPerCore
    if dies != 1 and _machine() == "aarch64":
        raise CpuTopologyDiesPerPackage
    if threads * cores * dies * packages != cpus.max_vcpus:
        raise CpuTopologyCount


def _machine() -> str:
    return os.uname().machine
