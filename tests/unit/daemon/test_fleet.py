"""Many VMMs in one process, on the fake engine: who is made and ended, and that none disturbs another."""

from __future__ import annotations

import os
import resource
import stat
import threading

import pytest

import cloudvmm.daemon.fleet
from cloudvmm import api
from cloudvmm.api.data import HeldState
from cloudvmm.api.error import InvalidVmmId, NoSuchVmm, TooManyVmms, VmmExists, VmmShuttingDown
from cloudvmm.client import Client
from cloudvmm.config.operation import VmForkData
from cloudvmm.control.journal import Journal, StateDirInUse
from cloudvmm.control.loop import ControlLoop
from cloudvmm.daemon.fleet import (
    SPARE_DESCRIPTORS,
    Fleet,
    TooManyRestored,
    VmmNotMade,
    VmmSocketTooLong,
)
from cloudvmm.daemon.registry import DaemonFolderFormat, DaemonFolderInUse, DaemonListBroken, Registry
from cloudvmm.engine.fake import Die, FakeEngine, Hang
from cloudvmm.errors import VmmError, error_chain
from cloudvmm.http.error import ApiSocketInUse
from support.argument import ARGUMENTS
from support.deadline import HOST_S
from support.leak import Holdings
from support.wait import wait_until

CONFIG = ARGUMENTS["vm.create"]
MANY = 50
FAULT = ["The VMM failed inside: RuntimeError('a mistake')", "a mistake"]


class Nest:
    """A folder with fleets in it, one after the other."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.engine = FakeEngine()
        self.logged: list[tuple[str, str]] = []
        self.fleet = self.open()

    def open(self, *, max_vmms: int = 60, state: str | None = None) -> Fleet:
        (self.folder / "sockets").mkdir(exist_ok=True)
        self.fleet = Fleet(
            self.engine,
            socket_dir=f"{self.folder}/sockets",
            max_vmms=max_vmms,
            max_connections=10,
            log=self._log,
            registry=None if state is None else Registry(f"{self.folder}/{state}"),
        )
        return self.fleet

    def _log(self, level, text) -> None:
        self.logged.append((level, text if isinstance(text, str) else text()))

    def close(self) -> None:
        self.fleet.end()
        self.fleet.wait(HOST_S)
        self.fleet.close()


@pytest.fixture
def nest(tmp_path):
    before = Holdings()
    nest = Nest(tmp_path)
    yield nest
    nest.close()
    before.assert_nothing_added()
    assert os.listdir(tmp_path / "sockets") == []


@pytest.fixture
def fleet(nest):
    return nest.fleet


def names(fleet):
    return [vmm.id for vmm in fleet.vmms().vmms]


def ids_in(nest, state="state"):
    return sorted(os.listdir(nest.folder / state / "vms"))


def socket_of(nest, vmm_id):
    return f"{nest.folder}/sockets/{vmm_id}.sock"


def boot(path):
    with Client(path) as client:
        client.vm_create(CONFIG)
        client.vm_boot()


def refused(call, argument):
    """Start a thread in which `call` is made, and must fail."""

    def run():
        with pytest.raises(VmmError):
            call(argument)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def in_threads(call, arguments):
    """Call with each of `arguments` at once; return what each returned or raised."""
    outcomes = []
    barrier = threading.Barrier(len(arguments))

    def run(argument):
        barrier.wait(HOST_S)
        try:
            outcomes.append(call(argument))
        except VmmError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HOST_S)
    assert len(outcomes) == len(arguments)
    return outcomes


def test_a_vmm_answers_at_its_own_socket_which_is_its_owners_alone(nest, fleet):
    made = fleet.create("web")

    assert (made.id, made.api_socket, made.state) == ("web", socket_of(nest, "web"), HeldState.RUNNING)
    assert stat.S_IMODE(os.stat(made.api_socket).st_mode) == 0o600
    boot(made.api_socket)
    (told,) = fleet.vmms().vmms
    assert (told.state, told.vm_state) == (HeldState.RUNNING, api.VmState.RUNNING)


def test_each_has_a_vm_of_its_own(fleet):
    one, other = fleet.create("one"), fleet.create("other")
    boot(one.api_socket)

    assert [vmm.vm_state for vmm in fleet.vmms().vmms] == [api.VmState.RUNNING, None]
    boot(other.api_socket)
    with Client(one.api_socket) as client:
        client.vm_pause()
    assert [vmm.vm_state for vmm in fleet.vmms().vmms] == [api.VmState.PAUSED, api.VmState.RUNNING]


@pytest.mark.parametrize(
    "vmm_id",
    ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "-x", "a b", "a\n", "a\0", "ä", "x" * 65, "a" * 5000],
)
def test_a_name_that_could_be_a_path_is_refused(nest, fleet, vmm_id):
    with pytest.raises(InvalidVmmId):
        fleet.create(vmm_id)

    assert fleet.vmms().vmms == []
    assert os.listdir(nest.folder / "sockets") == []


def test_the_longest_name_is_taken(fleet, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fleet._socket_dir = "sockets"

    assert fleet.create("x" * 64).state is HeldState.RUNNING
    fleet.delete("x" * 64)


def test_a_path_that_no_socket_can_have_leaves_nothing(nest, fleet, tmp_path):
    fleet._socket_dir = f"{tmp_path}/{'long' * 30}"
    with pytest.raises(VmmNotMade) as caught:
        fleet.create("web")

    assert isinstance(caught.value.__cause__, VmmSocketTooLong)
    assert fleet.count == 0


def test_of_many_clients_that_want_one_name_one_gets_it(nest, fleet):
    outcomes = in_threads(fleet.create, ["web"] * 8)

    assert sum(not isinstance(outcome, VmmError) for outcome in outcomes) == 1
    assert {type(outcome) for outcome in outcomes if isinstance(outcome, VmmError)} == {VmmExists}
    assert names(fleet) == ["web"]


def test_many_at_once_use_every_type_for_the_first_time_together(fleet):
    wanted = [f"vm{number}" for number in range(MANY)]

    outcomes = in_threads(lambda vmm_id: boot(fleet.create(vmm_id).api_socket), wanted)

    assert outcomes == [None] * MANY
    found = fleet.vmms().vmms
    assert sorted(vmm.id for vmm in found) == sorted(wanted)
    assert {vmm.vm_state for vmm in found} == {api.VmState.RUNNING}


def test_there_are_no_more_than_there_may_be(nest):
    nest.close()
    fleet = nest.open(max_vmms=2)
    fleet.create("one")
    fleet.create("two")

    with pytest.raises(TooManyVmms, match="There are 2 VMMs already, and there may be no more"):
        fleet.create("three")

    fleet.delete("one")
    fleet.create("three")
    assert names(fleet) == ["two", "three"]


def test_what_was_deleted_is_gone_and_its_name_free(nest, fleet):
    boot(fleet.create("web").api_socket)
    fleet.delete("web")

    assert os.listdir(nest.folder / "sockets") == []
    with pytest.raises(NoSuchVmm):
        fleet.delete("web")
    assert fleet.create("web").state is HeldState.RUNNING


def test_two_clients_may_delete_at_once(fleet):
    fleet.create("web")

    outcomes = in_threads(fleet.delete, ["web"] * 4)

    assert {type(outcome) for outcome in outcomes} <= {type(None), NoSuchVmm}
    assert None in outcomes
    assert fleet.count == 0


def test_a_vmm_that_is_told_to_end_on_its_own_socket_leaves_the_list(nest, fleet):
    made = fleet.create("web")
    with Client(made.api_socket) as client:
        client.vmm_shutdown()

    wait_until(lambda: fleet.count == 0, "the VMM is forgotten", timeout_s=HOST_S)
    assert os.listdir(nest.folder / "sockets") == []


def test_a_vm_that_dies_does_not_disturb_the_others(nest, fleet):
    broken, other = fleet.create("broken"), fleet.create("other")
    boot(other.api_socket)
    nest.engine.faults.set("pause", Die(), times=1)
    boot(broken.api_socket)
    with Client(broken.api_socket) as client, pytest.raises(VmmError):
        client.vm_pause()

    with Client(other.api_socket) as client:
        assert client.vm_info().state is api.VmState.RUNNING
    assert [(vmm.id, vmm.state) for vmm in fleet.vmms().vmms] == [
        ("broken", HeldState.RUNNING),
        ("other", HeldState.RUNNING),
    ]


def test_a_vm_that_hangs_is_deleted_all_the_same(nest, fleet):
    made = fleet.create("web")
    nest.engine.faults.set("boot", Hang(), times=1)
    with Client(made.api_socket) as client:
        client.vm_create(CONFIG)
    booting = refused(boot_created, made.api_socket)
    wait_until(lambda: fleet.jobs().jobs, "vm.boot is under way", timeout_s=HOST_S)

    fleet.delete("web")

    booting.join(HOST_S)
    assert not booting.is_alive()
    assert fleet.count == 0


def boot_created(path):
    with Client(path) as client:
        client.vm_boot()


def test_a_fault_of_a_vmm_is_kept_until_it_is_deleted(fleet, monkeypatch):
    accept = ControlLoop._accept

    def break_down(loop, request):
        if isinstance(request, api.VmAction.NMI.value):
            raise RuntimeError("a mistake")
        accept(loop, request)

    monkeypatch.setattr(ControlLoop, "_accept", break_down)
    made = fleet.create("web")
    fleet.create("other")
    member = fleet._members["web"]
    with Client(made.api_socket) as client, pytest.raises(VmmError):
        client.vm_nmi()
    wait_until(lambda: member.state is HeldState.FAILED, "the VMM is told as failed", timeout_s=HOST_S)

    failed, other = fleet.vmms().vmms
    assert (failed.state, failed.error) == (HeldState.FAILED, FAULT)
    assert other.state is HeldState.RUNNING
    with pytest.raises(VmmExists):
        fleet.create("web")
    assert fleet.jobs().silent == []
    fleet.delete("web")
    assert names(fleet) == ["other"]


def test_jobs_of_all_are_told_and_called_off(nest, fleet):
    one = fleet.create("one")
    fleet.create("other")
    nest.engine.faults.set("boot", Hang(), times=1)
    with Client(one.api_socket) as client:
        client.vm_create(CONFIG)
    threads = [refused(boot_created, one.api_socket)]
    wait_until(lambda: fleet.jobs().jobs, "vm.boot is under way", timeout_s=HOST_S)
    threads.append(refused(pause, one.api_socket))
    found = wait_until(
        lambda: found if len(found := fleet.jobs().jobs) == 2 else None, "vm.pause waits", timeout_s=HOST_S
    )
    assert [(job.vmm, job.command) for job in found] == [("one", "vm.boot"), ("one", "vm.pause")]

    with pytest.raises(api.JobNotCancellable):
        fleet.cancel_job("one", found[0].id)
    fleet.cancel_job("one", found[1].id)
    with pytest.raises(api.NoSuchJob):
        fleet.cancel_job("other", 99)
    with pytest.raises(NoSuchVmm):
        fleet.cancel_job("none", 1)

    threads[1].join(HOST_S)
    fleet.delete("one")
    threads[0].join(HOST_S)
    assert not any(thread.is_alive() for thread in threads)


def pause(path):
    with Client(path) as client:
        client.vm_pause()


def test_a_socket_that_somebody_serves_is_not_taken_and_nothing_of_theirs_is_touched(nest, fleet):
    fleet.create("web")
    second = Fleet(
        nest.engine,
        socket_dir=f"{nest.folder}/sockets",
        max_vmms=2,
        max_connections=10,
        log=lambda *_: None,
    )

    with pytest.raises(ApiSocketInUse):
        second.create("web")

    assert sorted(os.listdir(nest.folder / "sockets")) == ["web.sock", "web.sock.lock"]
    assert second.count == 0
    with Client(socket_of(nest, "web")) as client:
        assert client.vmm_ping().pid == os.getpid()


def test_where_no_thread_is_to_be_had_nothing_is_left(nest, fleet, monkeypatch):
    before = Holdings()

    def refuse(*_, **__):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(cloudvmm.daemon.fleet, "Vmm", refuse)
        with pytest.raises(VmmNotMade) as caught:
            fleet.create("web")

    assert error_chain(caught.value) == ["The VMM could not be started", "can't start new thread"]
    assert fleet.count == 0
    before.assert_nothing_added()
    fleet.create("web")


def test_clones_are_vmms_of_the_fleet_too(nest, fleet):
    made = fleet.create("web")
    boot(made.api_socket)
    fleet.create("clone-0")  # the name that the first clone would have
    clones = nest.folder / "clones"
    clones.mkdir()
    with Client(made.api_socket) as client:
        forked = client.vm_fork(VmForkData(directory=str(clones), count=2))

    assert names(fleet) == ["web", "clone-0", "clone-0-2", "clone-1"]
    sockets = {vmm.id: vmm.api_socket for vmm in fleet.vmms().vmms}
    assert [sockets["clone-0-2"], sockets["clone-1"]] == [clone.api_socket for clone in forked.clones]
    fleet.delete("web")
    with Client(sockets["clone-1"]) as client:
        assert client.vm_info().state is api.VmState.RUNNING
    fleet.delete("clone-1")
    assert names(fleet) == ["clone-0", "clone-0-2"]


def test_after_the_end_none_is_made(nest, fleet):
    fleet.create("web")
    fleet.end()
    fleet.wait(HOST_S)

    with pytest.raises(VmmShuttingDown):
        fleet.create("late")


# With a state folder.


@pytest.fixture
def kept(nest):
    nest.close()
    return nest.open(state="state")


def test_each_has_a_folder_below_the_daemons(nest, kept):
    kept.create("web")
    kept.create("db")
    assert ids_in(nest) == ["db", "web"]
    assert stat.S_IMODE(os.stat(nest.folder / "state" / "vms" / "web").st_mode) == 0o700

    kept.delete("web")

    assert ids_in(nest) == ["db"]
    assert Registry.read(kept._registry) == ["db"]


def test_the_next_daemon_on_the_folder_has_the_same_vmms(nest, kept):
    kept.create("web")
    kept.create("db")
    nest.close()

    fleet = nest.open(state="state")
    fleet.restore()

    assert [(vmm.id, vmm.state, vmm.vm_state) for vmm in fleet.vmms().vmms] == [
        ("web", HeldState.RUNNING, None),
        ("db", HeldState.RUNNING, None),
    ]
    with Client(socket_of(nest, "web")) as client:
        client.vmm_ping()


def test_a_folder_that_cannot_be_used_is_told_and_the_others_are_there(nest, kept):
    kept.create("web")
    kept.create("db")
    nest.close()
    (nest.folder / "state" / "vms" / "web" / "format").write_text("99\n")

    fleet = nest.open(state="state")
    fleet.restore()

    failed, other = fleet.vmms().vmms
    assert (failed.id, failed.state) == ("web", HeldState.FAILED)
    assert "format" in failed.error[0]
    assert (other.id, other.state) == ("db", HeldState.RUNNING)
    fleet.delete("web")
    assert ids_in(nest) == ["db"]


def test_a_vmm_that_could_not_be_made_leaves_no_folder_and_no_entry(nest, kept, monkeypatch):
    blocker = nest.folder / "sockets" / "web.sock.lock"
    blocker.mkdir()  # where the lock would be
    with pytest.raises(VmmError):
        kept.create("web")
    blocker.rmdir()

    assert ids_in(nest) == []
    assert Registry.read(kept._registry) == []


def test_what_another_vmm_has_is_not_ended_by_deleting_one_that_failed(nest, kept, monkeypatch):
    kept.create("web")
    nest.close()
    folder = nest.folder / "state" / "vms" / "web"
    other = Journal(str(folder))
    fleet = nest.open(state="state")
    fleet.restore()
    discarded: list[str] = []
    monkeypatch.setattr(nest.engine, "discard", discarded.append)

    with pytest.raises(StateDirInUse):
        fleet.delete("web")

    assert [vmm.state for vmm in fleet.vmms().vmms] == [HeldState.FAILED]
    assert (discarded, (folder / "journal").exists()) == ([], True)
    other.close()
    fleet.delete("web")
    assert (discarded, ids_in(nest), names(fleet)) == ([str(folder)], [], [])


def test_a_folder_that_nobody_listed_is_kept_where_it_cannot_be_taken_over(nest, kept, monkeypatch):
    folder = nest.folder / "state" / "vms" / "web"
    folder.mkdir(mode=0o700)
    (folder / "format").write_text("99\n")
    discarded: list[str] = []
    monkeypatch.setattr(nest.engine, "discard", discarded.append)

    with pytest.raises(VmmError, match="format"):
        kept.create("web")

    assert [(vmm.id, vmm.state) for vmm in kept.vmms().vmms] == [("web", HeldState.FAILED)]
    assert (Registry.read(kept._registry), ids_in(nest)) == (["web"], ["web"])
    kept.delete("web")
    assert (discarded, ids_in(nest)) == ([str(folder)], [])


def test_a_failed_one_whose_folder_cannot_be_taken_is_deleted_from_the_list_alone(nest, kept):
    kept.create("web")
    nest.close()
    folder = nest.folder / "state" / "vms" / "web"
    folder.rename(nest.folder / "kept")
    folder.write_text("")
    fleet = nest.open(state="state")
    fleet.restore()

    fleet.delete("web")

    assert names(fleet) == []
    assert Registry.read(fleet._registry) == []


def test_a_name_that_is_in_the_list_twice_is_made_once(nest, kept):
    nest.close()
    (nest.folder / "state" / "vmms.json").write_bytes(b'{"vmms":["web","web"]}')
    fleet = nest.open(state="state")
    fleet.restore()

    assert [(vmm.id, vmm.state) for vmm in fleet.vmms().vmms] == [("web", HeldState.RUNNING)]


def test_a_list_that_cannot_be_written_keeps_the_vmm_from_being_made(nest, kept, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(kept._registry, "write", refuse)
        with pytest.raises(VmmNotMade):
            kept.create("web")

    assert kept.count == 0
    assert ids_in(nest) == []


def test_a_folder_belongs_to_one_daemon(nest, kept):
    with pytest.raises(DaemonFolderInUse):
        Registry(f"{nest.folder}/state")


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / "format").write_text("1\n")  # as a plain VMM writes it
    with pytest.raises(DaemonFolderFormat, match="has format '1'"):
        Registry(str(tmp_path))


@pytest.mark.parametrize("text", [b"", b"{", b'{"vmms":{}}', b'{"vmms":[7]}', b"\xff"])
def test_a_list_that_nobody_can_read_is_no_empty_list(tmp_path, text):
    registry = Registry(str(tmp_path))
    (tmp_path / "vmms.json").write_bytes(text)
    with pytest.raises(DaemonListBroken):
        registry.read()
    registry.close()


def test_a_list_with_a_path_in_it_makes_nothing_outside(nest, kept):
    nest.close()
    (nest.folder / "state" / "vmms.json").write_bytes(b'{"vmms":["../../outside","ok"]}')
    fleet = nest.open(state="state")
    fleet.restore()

    assert names(fleet) == ["ok"]
    assert not (nest.folder / "outside").exists()


def test_vmm_that_would_leave_too_few_descriptors_is_refused_and_leaves_nothing(nest, kept):
    kept.create("mail")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + SPARE_DESCRIPTORS // 2, limits[1]))
    try:
        with pytest.raises(VmmExists):
            kept.create("mail")
        with pytest.raises(VmmNotMade) as caught:
            kept.create("web")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert "allow it more (ulimit -n)" in error_chain(caught.value)[-1]
    assert ids_in(nest) == ["mail"]
    assert not list((nest.folder / "sockets").glob("web*"))
    kept.create("web")


def test_daemon_that_may_have_fewer_vmms_than_its_folder_says_so_and_touches_none(nest, kept):
    for name in ("web", "db"):
        kept.create(name)
    nest.close()
    fewer = nest.open(max_vmms=1, state="state")
    with pytest.raises(TooManyRestored, match="--max-vms"):
        fewer.restore()
    nest.close()
    fleet = nest.open(max_vmms=2, state="state")
    fleet.restore()

    assert [vmm.state for vmm in fleet.vmms().vmms] == [HeldState.RUNNING] * 2
    with pytest.raises(TooManyVmms):
        fleet.create("mail")
    for name in ("web", "db"):
        fleet.delete(name)
