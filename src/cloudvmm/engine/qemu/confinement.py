"""What a process of ours may reach, be it QEMU or a program that serves it: files, ports, system calls.

It is held to that from before its first instruction, by the thread that starts it, and what it gets from us
comes as descriptors. Nothing of that is undone by whoever takes the process over. Which user it is, is
`identity.py`'s.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from cloudvmm.config.vm import VmConfig
from cloudvmm.engine.base import DeviceError, EngineError, Reach
from cloudvmm.engine.qemu.fact import QemuFacts
from cloudvmm.engine.qemu.identity import (
    CHANGING,
    Wish,
    in_groups_of,
    powers_for,
    setpriv_words,
)
from cloudvmm.engine.qemu.process import SHELL, find_setpriv
from cloudvmm.host.capability import Capability, keep_capabilities, lacking
from cloudvmm.host.cgroup import ControlGroup
from cloudvmm.host.doorway import Doorway
from cloudvmm.host.error import HostError
from cloudvmm.host.landlock import TCP_VERSION, Access, Ruleset, landlock_version
from cloudvmm.host.program import is_script
from cloudvmm.host.seccomp import filter_thread
from cloudvmm.host.user import User, Want

# Where programs have their libraries, and who loads them, by the ABI of x86-64.
_LIBRARIES: Final = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_LOADERS: Final = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-musl-x86_64.so.1")
# Where programs that serve devices are installed, beside the folders of PATH.
_PROGRAMS: Final = ("/usr", "/bin", "/sbin")
_DEVICES: Final = ("/dev/null", "/dev/zero")
_ENTROPY: Final = ("/dev/urandom", "/dev/random", "/proc/sys/crypto", "/etc/ssl/openssl.cnf")
# What the host's memory and CPUs are: where guest's memory is bound to a node, its library looks there.
_TOPOLOGY: Final = ("/sys/devices/system/node", "/sys/devices/system/cpu", "/sys/kernel/mm")
_USERFAULT: Final = "/dev/userfaultfd"
_VFIO: Final = ("/dev/vfio", "/dev/iommu")
_VDPA: Final = "/sys/bus/vdpa"
_FIRST_WITH_USERFAULT_DEVICE: Final = (8, 0)
# Files of other users, such as a kernel; memory that stays; a low port that is forwarded to the guest.
_KEPT: Final = (Capability.DAC_OVERRIDE, Capability.IPC_LOCK, Capability.NET_BIND_SERVICE)
_SYSFS: Final = "/sys"
_MOST_PROCESSES: Final = 4096  # with their threads: of 254 vCPUs, of disks, of file systems


class ConfinementFailed(EngineError):
    """The process could not be confined; --qemu-landlock false goes without Landlock"""


class FileNotAdmitted(DeviceError):
    """The file cannot be opened to a QEMU that runs: name it in landlock_rules before the VM is made"""


class FileNotShown(DeviceError):
    """QEMU's user may not open it: name it in landlock_rules first, or start with --qemu-user root"""


class GroupFailed(EngineError):
    """The control group for QEMU and its helper programs could not be made"""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How far this engine's processes are confined: `has_filter` is about system calls, `user` about QEMU.

    Who `is_enclosed` is held by Landlock to what the VM may reach, with all that is started. Nothing can be
    mounted from there. Below `groups`, a folder, each machine has a control group of its own.
    """

    has_landlock: bool = True
    has_filter: bool = True
    is_enclosed: bool = False
    user: Wish = "auto"
    groups: str | None = None

    @property
    def leaves_network(self) -> bool:
        """Whether the network is everybody's."""
        return not (self.has_landlock or self.has_filter)


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """For one program. The paths are allowed where they are there; beneath folders, all is.

    `changeable` are folders in which it makes and removes what it likes. With `has_network` it may use the
    network. Without Landlock, as the policy says or because a program confines itself and needs to be free
    for that, `is_held` is false; the same for `is_filtered` and system calls. Of root's powers it has those
    that are `kept`. As a `user` of its own it has what it takes to have what is `wanted`, too.
    """

    runnable: Sequence[str] = ()
    readable: Sequence[str] = ()
    usable: Sequence[str] = ()
    changeable: Sequence[str] = ()
    has_network: bool = False
    is_held: bool = True
    is_filtered: bool = True
    kept: Sequence[Capability] = ()
    user: User | None = None
    wanted: Sequence[Want] = ()

    def enter(self, fds: Iterable[int]) -> Sequence[str]:
        """Hold the calling thread to this, and whatever it starts. It may open again what is open as `fds`.

        Returns what `setpriv` is to be told. Where the kernel has no Landlock, there is none. The thread
        finds no module of Python's any more.

        :raises ConfinementFailed: the kernel refuses; the cause tells why.
        """
        try:
            told = self._settle_powers()
            if self.is_held and landlock_version():
                self._hold(fds)
            if self.is_filtered:
                filter_thread(has_network=self.has_network)
        except (HostError, OSError) as error:
            raise ConfinementFailed from error
        return told

    def _settle_powers(self) -> Sequence[str]:
        if self.user is None:
            keep_capabilities(self.kept)
            return ()
        missing = lacking(self.kept)  # `setpriv` would fail of what it cannot pass on
        kept = [each for each in self.kept if each not in missing]
        kept += powers_for(self.user, self.wanted)
        keep_capabilities([*kept, *CHANGING])
        return setpriv_words(self.user, kept)

    def _hold(self, fds: Iterable[int]) -> None:
        with Ruleset(has_tcp=self.has_network, is_scoped=True) as rules:
            rules.allow_present((*self.runnable, SHELL, find_setpriv(), *_LOADERS), Access.RUN)
            rules.allow_present((*self.readable, *_LIBRARIES), Access.READ)
            rules.allow_present((*self.usable, *_DEVICES), Access.USE)
            rules.allow_present(self.changeable, Access.USE | Access.READ | Access.CHANGE)
            for fd in fds:
                with contextlib.suppress(OSError):  # what is wrong with it is said by who uses it
                    rules.allow(fd, _access_of(fd))
            rules.restrict_thread()


def confine_qemu(
    policy: Policy,
    facts: QemuFacts,
    vm_config: VmConfig,
    *,
    files: Iterable[str],
    private_files: Iterable[str],
    doorway: Doorway | None,
    has_network: bool,
    has_faults: bool = False,
    user: User | None = None,
    wanted: Iterable[Want] = (),
) -> Confinement:
    """Return what a QEMU that runs `vm_config` may reach; `files` are what it writes to by their paths,
    and `private_files` what it asks to write to, but does not.

    `user` is whom it runs as, where that is not us, and `wanted` what it opens then of its payload and of
    what was opened for it. `has_faults` says that memory follows its guest.
    """
    readable = [vm_config.rng.src, *_program_files(facts)]
    usable = [*files]
    for rule in vm_config.landlock_rules or ():
        (usable if "w" in rule.access else readable).append(rule.path)
    devices = [*([facts.kvm_device] if facts.accelerator == "kvm" else ()), *_vfio_devices()]
    if vm_config.platform is not None and vm_config.platform.iommufd:
        devices.append(_VFIO[1])
    faults = [_USERFAULT] if has_faults and _knows_userfault_device(facts) else []
    wanted = [
        *wanted,
        Want(facts.binary, os.X_OK),
        *(Want(path, os.R_OK) for path in readable),
        *(Want(path, os.R_OK | os.W_OK) for path in (*usable, *devices, *faults)),
    ]
    readable += [*_payload_files(vm_config), *_ENTROPY, *_TOPOLOGY]
    usable += [_USERFAULT, *devices, *private_files]
    if doorway is not None:
        usable.append(doorway.path)
    if os.path.isdir(_VFIO[0]):
        # QEMU itself opens the groups of devices, which an administrator has set aside for guests.
        usable += _VFIO
        readable.append(_SYSFS)
    kept = [*_KEPT, *_kept_for_faults(facts)]
    if user is not None:
        user = in_groups_of(user, [*devices, *faults])
        kept = _kept_by_another(facts, has_network=has_network, has_faults=has_faults)
    return Confinement(
        runnable=[facts.binary],
        readable=readable,
        usable=usable,
        has_network=has_network,
        is_held=policy.has_landlock and not is_script(facts.binary),
        is_filtered=policy.has_filter,
        kept=kept,
        user=user,
        wanted=wanted,
    )


def reach_of(
    policy: Policy, facts: QemuFacts, vm_config: VmConfig, *, adopted_groups: str | None = None
) -> Reach:
    """Return what QEMU and the programs beside it may reach whatever the guest, and who starts them needs.

    The group of a machine that was taken over is below `adopted_groups`.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    programs = (*_PROGRAMS, *(folder for folder in folders if os.path.isabs(folder)))
    usable = [*_DEVICES, _USERFAULT, facts.kvm_device]
    usable += [groups for groups in (policy.groups, adopted_groups) if groups is not None]
    if vm_config.devices:
        usable += _VFIO
    return Reach(
        runnable=[facts.binary, sys.executable, SHELL, find_setpriv(), *_LOADERS, *_LIBRARIES, *programs],
        readable=[*_own_files(facts), _SYSFS],
        usable=usable,
    )


def _kept_by_another(facts: QemuFacts, *, has_network: bool, has_faults: bool) -> list[Capability]:
    """Return what a QEMU that is another user needs of root's powers, whatever it opens."""
    pins_memory = any(map(os.path.isdir, (_VFIO[0], _VDPA)))
    return [
        *([Capability.IPC_LOCK] if pins_memory else ()),
        *([Capability.NET_BIND_SERVICE] if has_network else ()),
        *(_kept_for_faults(facts) if has_faults else ()),
    ]


def _kept_for_faults(facts: QemuFacts) -> list[Capability]:
    """Return what memory that follows its guest takes where QEMU has no device for it."""
    return [] if _knows_userfault_device(facts) else [Capability.SYS_PTRACE]


def _knows_userfault_device(facts: QemuFacts) -> bool:
    return os.path.exists(_USERFAULT) and facts.version >= _FIRST_WITH_USERFAULT_DEVICE


def _vfio_devices() -> list[str]:
    """Return what there is for QEMU to open of devices that are handed through."""
    return [f"{folder}/{name}" for folder, _, names in os.walk(_VFIO[0]) for name in names]


def _payload_files(vm_config: VmConfig) -> list[str]:
    payload = vm_config.payload
    named = () if payload is None else (payload.kernel, payload.initramfs, payload.firmware)
    return [os.path.abspath(path) for path in named if path is not None]


def _program_files(facts: QemuFacts) -> list[str]:
    """Return what QEMU reads of itself."""
    firmware = (facts.qboot_path, facts.seabios_path, *facts.firmware_folders)
    found = [os.path.abspath(path) for path in firmware if path is not None]
    return [*found, *_beside(facts.binary)]


def _own_files(facts: QemuFacts) -> list[str]:
    """Return what QEMU reads of itself and of the host, whatever the guest."""
    return [*_program_files(facts), *_ENTROPY, *_TOPOLOGY]


def landlock_gap(policy: Policy, facts: QemuFacts) -> str | None:
    """Return why QEMU is not held to its files, or not wholly, although the policy says so; None if it is."""
    if not policy.has_landlock:
        return None
    if is_script(facts.binary):
        return f"{facts.binary} is a script: QEMU is not held to the files of its VM by Landlock"
    version = landlock_version()
    if version == 0:
        return "This kernel has no Landlock, or it is not enabled: QEMU is not held to the files of its VM"
    if version < TCP_VERSION:
        return (
            f"Landlock of this kernel is version {version}: QEMU is held to its files but not kept from TCP"
        )
    return None


def open_doorway(policy: Policy, state_dir: str | None = None, user: User | None = None) -> Doorway | None:
    """Return what files come to QEMU by later, where there is need for it and we may mount.

    It runs as `user`, as us where that is None. `state_dir` is that of a QEMU that outlives us.
    """
    if policy.is_enclosed or os.geteuid() != 0:
        return None
    if policy.has_landlock and landlock_version():
        return Doorway(state_dir, reader=user)
    if user is not None:
        with contextlib.suppress(OSError):  # few files need it, and QEMU says then that it may not
            return Doorway(state_dir, reader=user)
    return None


def open_group(policy: Policy, state_dir: str | None = None) -> ControlGroup | None:
    """Return the control group for a machine's processes, None where they are in ours.

    :raises GroupFailed: it cannot be made; the cause tells why.
    """
    if policy.groups is None:
        return None
    try:
        return ControlGroup(policy.groups, most_processes=_MOST_PROCESSES, state_dir=state_dir)
    except OSError as error:
        raise GroupFailed from error


def admit(doorway: Doorway | None, fd: int, undo: contextlib.ExitStack) -> int:
    """Return a descriptor of the file of `fd` that QEMU may open again until `undo` closes it.

    :raises FileNotAdmitted: we may not mount.
    """
    if doorway is None:
        return fd  # QEMU may open what it likes, or says that it may not
    try:
        return doorway.admit(fd, undo)
    except OSError as error:
        raise FileNotAdmitted from error


def confine_program(
    policy: Policy, program: str, *, readable: Sequence[str] = (), has_network: bool = False
) -> Confinement:
    """Return what `program`, which serves a device, may reach beside what it gets as descriptors."""
    return Confinement(
        runnable=[program],
        readable=[*readable, *_ENTROPY],
        has_network=has_network,
        is_held=policy.has_landlock and not is_script(program),
        is_filtered=policy.has_filter,
        kept=[Capability.DAC_OVERRIDE],
    )


def _beside(program: str) -> list[str]:
    """Return where a program that lies in another place than usual has its own files."""
    prefix = os.path.dirname(os.path.dirname(os.path.realpath(program)))
    return [f"{prefix}/{name}" for name in ("lib", "lib64", "share/qemu", "share/seabios")]


def _access_of(fd: int) -> Access:
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        return Access.USE | Access.READ | Access.CHANGE
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return Access.READ_FILE if access == os.O_RDONLY else Access.USE
