"""Virtual CPUs: count, topology and the model that the guest sees."""

from __future__ import annotations

from typing import Final

from cloudvmm.config.cpu import CoreScheduling, CpusConfig
from cloudvmm.engine.base import EngineError, NotSupportedYet
from cloudvmm.engine.qemu.fact import KVM_CPU_MODEL, KVM_DEVICE, Accelerator
from cloudvmm.engine.qemu.parts import escape

MAX_VCPUS: Final = 255  # of the machine type pc

# Under emulation the model is spelled out: `max` changes with every release of QEMU, and a guest restored
# on another one would hang. This set is x86-64-v3 and what a kernel makes use of, as far as QEMU 7.2
# emulates it. `enforce` makes a QEMU that lacks one of them refuse to start instead of taking it away
# silently.
# Left out: erms, fsgsbase and clwb, which cost boot time under emulation. Never leave out xsaveopt: with
# AVX but without it the guest hangs before its first process.
_EMULATED_FEATURES: Final = (
    "ssse3",
    "sse4.1",
    "sse4.2",
    "popcnt",
    "movbe",
    "aes",
    "pclmulqdq",
    "rdrand",
    "xsave",
    "xsaveopt",
    "avx",
    "f16c",
    "fma",
    "avx2",
    "bmi1",
    "bmi2",
    "abm",
    "adx",
    "smep",
    "smap",
    "clflushopt",
    "rdtscp",
    "pdpe1gb",
    "arat",
)
_EMULATED_PHYS_BITS: Final = 40

_HYPERV_FEATURES: Final = (
    "hv-relaxed",
    "hv-vapic",
    "hv-time",
    "hv-vpindex",
    "hv-runtime",
    "hv-synic",
    "hv-stimer",
)


class TooManyVcpus(EngineError):
    def __init__(self, asked: int) -> None:
        super().__init__(f"Maximum number of vCPUs {asked} exceeds host limit {MAX_VCPUS}")


def cpu_arguments(
    cpus: CpusConfig, accelerator: Accelerator, *, kvm_device: str = KVM_DEVICE, loses_writes: bool = False
) -> list[str]:
    """Return the options for accelerator, model and count.

    Emulated vCPUs run side by side. Where that `loses_writes` they take turns on one thread, unless threads
    of their own are asked for, or vCPUs may come and go.

    :raises TooManyVcpus: more than the machine can have.
    :raises NotSupportedYet: a feature that the accelerator cannot give.
    """
    if cpus.max_vcpus > MAX_VCPUS:
        raise TooManyVcpus(cpus.max_vcpus)
    if accelerator == "kvm":
        return ["-accel", kvm_accelerator(kvm_device), "-cpu", _host_model(cpus), "-smp", _count(cpus)]
    threads = "single" if loses_writes and _may_take_turns(cpus) else "multi"
    return ["-accel", f"tcg,thread={threads}", "-cpu", _emulated_model(cpus), "-smp", _count(cpus)]


def _may_take_turns(cpus: CpusConfig) -> bool:
    has_threads = bool(cpus.affinity) or cpus.core_scheduling is CoreScheduling.VCPU
    return 1 < cpus.boot_vcpus == cpus.max_vcpus and not has_threads


def kvm_accelerator(device: str) -> str:
    """Return what `-accel` wants for KVM on `device`. Another than /dev/kvm needs QEMU 9.0."""
    return "kvm" if device == KVM_DEVICE else f"kvm,device={escape(device)}"


def _count(cpus: CpusConfig) -> str:
    if cpus.topology is None:
        sockets, dies, cores, threads = 1, 1, cpus.max_vcpus, 1
    else:
        sockets, dies = cpus.topology.packages, cpus.topology.dies_per_package
        cores, threads = cpus.topology.cores_per_die, cpus.topology.threads_per_core
    return (
        f"{cpus.boot_vcpus},sockets={sockets},dies={dies},cores={cores},threads={threads}"
        f",maxcpus={cpus.max_vcpus}"
    )


def _host_model(cpus: CpusConfig) -> str:
    settings = [KVM_CPU_MODEL, "migratable=on", f"host-phys-bits-limit={cpus.max_phys_bits}"]
    if not cpus.nested:
        settings += ["vmx=off", "svm=off"]
    if not cpus.features.amx:
        settings += ["amx-tile=off", "amx-bf16=off", "amx-int8=off"]
    if cpus.kvm_hyperv:
        settings += [f"{feature}=on" for feature in _HYPERV_FEATURES] + ["hv-spinlocks=8191"]
    return ",".join(settings)


def _emulated_model(cpus: CpusConfig) -> str:
    if cpus.features.amx:
        raise NotSupportedYet("The CPU feature amx needs KVM: emulation does not have it")
    if cpus.kvm_hyperv:
        raise NotSupportedYet("Hyper-V enlightenments need KVM: emulation does not have them")
    if cpus.max_phys_bits < _EMULATED_PHYS_BITS:
        raise NotSupportedYet(
            f"Emulation has {_EMULATED_PHYS_BITS} physical address bits"
            f" and cannot do with {cpus.max_phys_bits}"
        )
    settings = ["qemu64", "enforce=on", *_emulated_vendor(cpus)]
    return ",".join(settings + [f"{feature}=on" for feature in _EMULATED_FEATURES])


def _emulated_vendor(cpus: CpusConfig) -> list[str]:
    """Choose a vendor: QEMU emulates nested virtualisation of AMD only, threads of a core of Intel only."""
    if cpus.topology is not None and cpus.topology.threads_per_core > 1:
        return ["vendor=GenuineIntel", "family=6", "model=60", "stepping=4", "svm=off", "npt=off"]
    nested = "on" if cpus.nested else "off"
    return [f"svm={nested}", f"npt={nested}"]
