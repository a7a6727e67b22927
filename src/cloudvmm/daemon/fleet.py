"""Many VMMs in one process, by name: made and ended one by one, each with its socket, threads and folder.

What happens to one is its own: a VMM that ends, whoever ended it, leaves the others alone, and nothing here
waits for a VMM without a deadline. Clones of a VM that is forked are VMMs of the fleet too.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import threading
import time
from collections import deque
from collections.abc import Collection
from functools import partial
from typing import Any, Final

from cloudvmm.api import action
from cloudvmm.api.channel import ReplyChannel
from cloudvmm.api.data import HeldJob, HeldJobs, HeldState, HeldVmm, HeldVmms, VmInfo, VmmJobs
from cloudvmm.api.error import InvalidVmmId, NoSuchVmm, TooManyVmms, VmmExists, VmmShuttingDown
from cloudvmm.client.table import VMM_PING
from cloudvmm.config.operation import VmmCancelJobData
from cloudvmm.control.journal import StateDirInUse, take_state_dir
from cloudvmm.control.runner import Log
from cloudvmm.control.sibling import BeginVm, CloneData, Siblings
from cloudvmm.daemon.registry import Registry
from cloudvmm.daemon.vmm import LazyLog, Vmm
from cloudvmm.engine.base import Engine
from cloudvmm.errors import VmmError, error_chain, json_text
from cloudvmm.host.error import HostError

LOOK_S: Final = 2.0
START_S: Final = 30.0
DELETE_S: Final = 45.0  # a VMM that is told to leave gives up by itself before

SPARE_DESCRIPTORS: Final = 64

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_SOCKET: Final = 107
_MOST_CLONES: Final = 1_000_000
_RESTORED_AT_ONCE: Final = 8


class VmmNotMade(VmmError):
    """The VMM could not be started"""


class TooFewDescriptors(VmmError):
    def __init__(self, limit: int, taken: int) -> None:
        super().__init__(
            f"The daemon may open {limit} files, has {taken}, and keeps {SPARE_DESCRIPTORS} for the VMs that"
            " there are: allow it more (ulimit -n)"
        )


class TooManyRestored(VmmError):
    def __init__(self, found: int, most: int) -> None:
        super().__init__(f"The state folder has {found} VMs, and there may be {most}: allow more (--max-vms)")


class VmmSocketTooLong(VmmError):
    def __init__(self, path: str) -> None:
        super().__init__(f"The path of a socket may have {_LONGEST_SOCKET} bytes: {path}")


class VmmStuck(VmmError):
    """`vmm_ids` were told to end."""

    def __init__(self, vmm_ids: list[str], seconds: float) -> None:
        super().__init__(f"Not ended within {seconds:g} s: {', '.join(vmm_ids)}")


class Member:
    """A VMM of the fleet. `folder` is its state folder, if it has one. The fleet's lock guards the rest."""

    __slots__ = ("api_socket", "error", "folder", "gone", "has_ended", "id", "state", "vmm")

    def __init__(self, vmm_id: str, api_socket: str, folder: str | None) -> None:
        self.id = vmm_id
        self.api_socket = api_socket
        self.folder = folder
        self.state = HeldState.STARTING
        self.error: list[str] | None = None
        self.vmm: Vmm | None = None
        self.has_ended = threading.Event()
        self.gone = threading.Event()  # and nothing is left of it


class Clone:
    """A `control.sibling.Sibling`: a member that a fork asked for."""

    def __init__(self, fleet: Fleet, member: Member) -> None:
        self._fleet = fleet
        self._member = member

    def begin(self, data: CloneData) -> ReplyChannel:
        assert self._member.vmm is not None
        return self._member.vmm.send(BeginVm, data)

    def resume(self) -> ReplyChannel:
        assert self._member.vmm is not None
        return self._member.vmm.send(action.VmResume, None)

    def close(self) -> None:
        with contextlib.suppress(NoSuchVmm, VmmStuck):
            self._fleet.delete(self._member.id)


class Fleet(Siblings):
    """Makes VMMs on engines like `engine`, at sockets in `socket_dir`, `max_vmms` at most. Any thread.

    With `registry`, which is the fleet's from here on, each has a state folder. `log` must not block.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        socket_dir: str,
        max_vmms: int,
        max_connections: int,
        peers: Collection[int] | None = None,
        log: Log,
        registry: Registry | None = None,
    ) -> None:
        self.max_vmms = max_vmms
        self.engine = engine
        self._socket_dir = socket_dir
        self._max_connections = max_connections
        self._peers = peers
        self._log = log
        self._registry = registry
        self._lock = threading.Lock()
        self._list_lock = threading.Lock()
        self._members: dict[str, Member] = {}
        self._is_ending = False

    @property
    def count(self) -> int:
        return len(self._members)

    def create(self, vmm_id: str) -> HeldVmm:
        """Blocking. Make a VMM and return it once it answers.

        Where its folder is there already, as after a loss of the list, the VM in it goes on.

        :raises VmmError: it cannot be. Nothing is left of it, but for one whose folder was there: that is
            listed as failed.
        """
        if not _ID.fullmatch(vmm_id):
            raise InvalidVmmId(vmm_id)
        return _told(self._make(vmm_id))

    def add(self, api_socket: str, name: str) -> Clone:
        """As `Siblings.add`. Where there is a VMM called `name` already, a number makes it another."""
        wanted = name if _ID.fullmatch(name) else "clone"
        for number in range(1, _MOST_CLONES):
            vmm_id = wanted if number == 1 else f"{wanted[:56]}-{number}"
            with contextlib.suppress(VmmExists):
                return Clone(self, self._make(vmm_id, api_socket))
        raise VmmExists(name)

    def restore(self) -> None:
        """Blocking. Make the VMMs again that the last daemon on the folder held, with the VMs that go on.

        One that cannot be made stays, as failed, until it is deleted.

        :raises DaemonListBroken: nobody knows which.
        :raises TooManyRestored: there are more than there may be; what goes on in their folders goes on.
        """
        if self._registry is None:
            return
        vmm_ids = list(dict.fromkeys(self._registry.read()))
        if len(vmm_ids) > self.max_vmms:
            raise TooManyRestored(len(vmm_ids), self.max_vmms)
        waiting: deque[Member] = deque()
        for vmm_id in vmm_ids:
            if not _ID.fullmatch(vmm_id):
                self._log("error", f"The list of VMMs has what cannot be a name: {vmm_id[:80]!r}")
                continue
            member = Member(vmm_id, self._socket_of(vmm_id), self._registry.folder_of(vmm_id))
            self._members[vmm_id] = member
            waiting.append(member)
        threads = [
            threading.Thread(target=self._restore_some, args=(waiting,), name="restore", daemon=True)
            for _ in range(min(len(waiting), _RESTORED_AT_ONCE))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _restore_some(self, waiting: deque[Member]) -> None:
        with contextlib.suppress(IndexError):  # there are none left
            while True:
                member = waiting.popleft()
                try:
                    self._start(member)
                except (VmmError, OSError, RuntimeError) as error:
                    self._fail(member, error)

    def vmms(self) -> HeldVmms:
        """Tell of all; takes as long as the slowest of them, `LOOK_S` at most."""
        answers = self._ask_all(action.VmInfoRequest, None)
        vmms = []
        for member, answer in answers:
            info = answer if isinstance(answer, VmInfo) else None
            vmms.append(_told(member, info))
        return HeldVmms(vmms=vmms)

    def jobs(self) -> HeldJobs:
        """Tell the jobs of all; takes as long as the slowest of them, `LOOK_S` at most."""
        jobs: list[HeldJob] = []
        silent: list[str] = []
        for member, answer in self._ask_all(action.VmmJobsRequest, None):
            if isinstance(answer, VmmJobs):
                jobs += [
                    HeldJob(vmm=member.id, **{name: getattr(job, name) for name in job.__struct_fields__})
                    for job in answer.jobs
                ]
            elif member.state is not HeldState.FAILED:
                silent.append(member.id)
        return HeldJobs(jobs=jobs, silent=silent)

    def cancel_job(self, vmm_id: str, job_id: int) -> None:
        """:raises VmmError: there is no such VMM or job, or it cannot be called off."""
        with self._lock:
            member = self._members.get(vmm_id)
        if member is None or member.vmm is None:
            raise NoSuchVmm(vmm_id)
        reply = member.vmm.send(action.VmmCancelJob, VmmCancelJobData(id=job_id))
        try:
            reply.recv(LOOK_S)
        except action.VmmCancelJob.error as error:
            raise error.__cause__ or error from None

    def delete(self, vmm_id: str) -> None:
        """Blocking. End a VMM, and return when nothing of it is left.

        :raises NoSuchVmm: there is none, or it is not there yet.
        :raises StateDirInUse: another VMM has its folder, and what is in it; it stays as it is.
        :raises VmmStuck: it takes longer than `DELETE_S`; it goes on ending.
        """
        with self._lock:
            member = self._members.get(vmm_id)
            if member is None or member.state is HeldState.STARTING:
                raise NoSuchVmm(vmm_id)
            before, member.state = member.state, HeldState.ENDING
        if before is HeldState.FAILED:
            self._discard(member)
        elif before is HeldState.RUNNING:
            assert member.vmm is not None
            member.vmm.leave()
        if not member.gone.wait(DELETE_S):
            raise VmmStuck([vmm_id], DELETE_S)

    def end(self) -> None:
        """Let all end, and none be made any more; their folders stay. Returns at once."""
        with self._lock:
            self._is_ending = True
            vmms = [member.vmm for member in self._members.values() if member.vmm is not None]
        for vmm in vmms:
            vmm.leave()

    def wait(self, timeout_s: float) -> None:
        """Blocking. Return when all have ended.

        :raises VmmStuck: some have not in `timeout_s`.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            members = [member for member in self._members.values() if member.state is not HeldState.FAILED]
        late = [
            member.id
            for member in members
            if not member.has_ended.wait(max(0.0, deadline_s - time.monotonic()))
        ]
        if late:
            raise VmmStuck(late, timeout_s)

    def close(self) -> None:
        """Let the folder go. The VMMs have ended."""
        if self._registry is not None:
            self._registry.close()

    def _socket_of(self, vmm_id: str) -> str:
        return f"{self._socket_dir}/{vmm_id}.sock"

    def _make(self, vmm_id: str, clone_socket: str | None = None) -> Member:
        member = self._reserve(vmm_id, clone_socket)
        was_there = member.folder is not None and os.path.lexists(member.folder)
        try:
            if member.folder is not None:
                self._write_list()  # before the folder is there
            self._start(member)
        except BaseException as error:
            if was_there:  # and what is in it is not ours to remove unasked: a guest may run on it
                self._fail(member, error)
            else:
                self._forget(member)
            if isinstance(error, OSError | RuntimeError):  # the host has no descriptor or thread left
                raise VmmNotMade from error
            raise
        return member

    def _reserve(self, vmm_id: str, clone_socket: str | None) -> Member:
        api_socket = clone_socket or self._socket_of(vmm_id)
        if len(os.fsencode(api_socket)) > _LONGEST_SOCKET:
            raise VmmNotMade from VmmSocketTooLong(api_socket)
        folder = None
        if self._registry is not None and clone_socket is None:
            folder = self._registry.folder_of(vmm_id)
        member = Member(vmm_id, api_socket, folder)
        with self._lock:
            if self._is_ending:
                raise VmmShuttingDown
            if vmm_id in self._members:
                raise VmmExists(vmm_id)
            if len(self._members) >= self.max_vmms:
                raise TooManyVmms(self.max_vmms)
            try:
                _check_descriptors()
            except (TooFewDescriptors, OSError) as error:
                raise VmmNotMade from error
            self._members[vmm_id] = member
        return member

    def _start(self, member: Member) -> None:
        """Start the VMM of `member`, and see that it answers."""
        vmm = Vmm(
            self.engine.another(),
            state_dir=member.folder,
            api_socket=member.api_socket,
            max_connections=self._max_connections,
            peers=self._peers,
            log=LazyLog(self._log, member.id),
            brood=self,
            on_end=partial(self._on_end, member),
            removes_lock=True,
        )
        try:
            vmm.call(VMM_PING, timeout_s=START_S)
        except VmmError as error:
            vmm.leave()
            member.has_ended.wait(START_S)
            raise VmmNotMade from (vmm.failure or error)
        with self._lock:
            member.vmm = vmm
            if not member.has_ended.is_set():
                member.state = HeldState.RUNNING
            must_leave = self._is_ending
        if must_leave:
            vmm.leave()
        if member.has_ended.is_set():
            raise VmmNotMade from (vmm.failure or VmmShuttingDown())

    def _on_end(self, member: Member) -> None:
        """The VMM of `member` has ended, whoever ended it."""
        with self._lock:
            member.has_ended.set()
            if member.state is HeldState.STARTING:
                return  # whoever starts it sees to the rest
            failure = None if member.vmm is None else member.vmm.failure
            was_deleted, member.state = member.state is HeldState.ENDING, HeldState.ENDING
            if self._is_ending and not was_deleted:
                return
        if failure is not None and not was_deleted:
            self._fail(member, failure)
        else:
            self._forget(member)

    def _fail(self, member: Member, error: BaseException) -> None:
        texts = [json_text(text) for text in error_chain(error)]
        self._log("error", f"The VMM {member.id} failed: {': '.join(texts)}")
        with self._lock:
            member.vmm, member.error, member.state = None, texts, HeldState.FAILED

    def _discard(self, member: Member) -> None:
        """End what goes on in the folder of a VMM that failed, and leave nothing of either.

        :raises StateDirInUse: it goes on under another VMM.
        """
        with contextlib.ExitStack() as undo:
            if member.folder is not None:
                try:
                    undo.callback(os.close, take_state_dir(member.folder))
                    self.engine.discard(member.folder)
                except StateDirInUse:
                    with self._lock:
                        member.state = HeldState.FAILED
                    raise
                except (OSError, HostError) as error:
                    self._log("error", f"The folder {member.folder} is left as it is: {error}")
            self._forget(member)

    def _forget(self, member: Member) -> None:
        """Leave nothing of a VMM that has ended, its name last."""
        member.has_ended.set()
        if member.folder is not None and self._registry is not None:
            self._registry.remove(member.id)
        with self._lock:
            self._members.pop(member.id, None)
        if member.folder is not None:
            try:
                self._write_list()
            except OSError as error:
                self._log("error", f"The list of VMMs could not be written: {error}")
        member.gone.set()

    def _write_list(self) -> None:
        assert self._registry is not None
        with self._list_lock:
            with self._lock:
                vmm_ids = [member.id for member in self._members.values() if member.folder is not None]
            self._registry.write(vmm_ids)

    def _ask_all(self, kind: type[action.ApiRequest], data: object) -> list[tuple[Member, Any]]:
        """Put a question to each member at once; the answer of one that has none is None."""
        deadline_s = time.monotonic() + LOOK_S
        with self._lock:
            members = list(self._members.values())
        asked = [(member, _ask(member, kind, data)) for member in members]
        return [(member, _answer(reply, deadline_s)) for member, reply in asked]


def _check_descriptors() -> None:
    """:raises TooFewDescriptors: another VMM would leave too few. :raises OSError: there is none left."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd"))
    if limit != resource.RLIM_INFINITY and limit - taken < SPARE_DESCRIPTORS:
        raise TooFewDescriptors(limit, taken)


def _ask(member: Member, kind: type[action.ApiRequest], data: object) -> ReplyChannel | None:
    vmm = member.vmm
    if vmm is None:
        return None
    try:
        return vmm.send(kind, data)
    except (VmmError, OSError):
        return None  # it has ended


def _answer(reply: ReplyChannel | None, deadline_s: float) -> object:
    if reply is None:
        return None
    try:
        return reply.recv(max(0.0, deadline_s - time.monotonic()))
    except VmmError:
        return None


def _told(member: Member, info: VmInfo | None = None) -> HeldVmm:
    return HeldVmm(
        id=member.id,
        api_socket=member.api_socket,
        state=member.state,
        vm_state=None if info is None else info.state,
        error=member.error,
    )
