"""Saving, sending and going on from either: as `engine.base` says, or refused before anything is touched."""

from __future__ import annotations

import os
import socket
import threading

import msgspec
import pytest

from cloudvmm.config.disk import ImageType
from cloudvmm.engine.base import (
    BeginsAt,
    DeviceError,
    EngineError,
    LinkLost,
    MachineGone,
    NotSupportedYet,
    ReceivedFrom,
    SavedIn,
    SentTo,
    StateError,
)
from support.leak import Holdings
from support.wait import wait_until

SOON_S = 10.0


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    return folder


@pytest.fixture
def link():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


class Beside:
    """A call in a thread of its own; `result` gives what it returned, or raises what it raised."""

    def __init__(self, call):
        self._call = call
        self._value = self._error = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self._value = self._call()
        except EngineError as error:
            self._error = error

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def result(self):
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), "the call does not come back"
        if self._error is not None:
            raise self._error
        return self._value


def from_origin(spec, origin):
    return msgspec.structs.replace(spec, origin=origin)


# Saved


def test_saved_files_have_names_of_their_own_and_the_guest_stays_paused(machine_paused, folder):
    machine_paused.save(str(folder))

    names = os.listdir(folder)
    assert names
    assert all(name.startswith("engine-") for name in names)
    machine_paused.resume()


def test_save_of_a_guest_that_runs_is_refused(machine_running, folder):
    with pytest.raises(EngineError):
        machine_running.save(str(folder))
    assert os.listdir(folder) == []


def test_save_over_a_file_that_exists_is_refused(machine_paused, folder):
    machine_paused.save(str(folder))
    with pytest.raises(EngineError):
        machine_paused.save(str(folder))


class CalledOff(Exception):
    pass


@pytest.mark.parametrize("is_mergeable", [False, True], ids=["shared", "mergeable"])
@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
def test_saving_that_is_called_off_leaves_nothing_and_can_be_done_again(
    engine, spec, folder, is_mergeable, is_last
):
    memory = msgspec.structs.replace(spec.vm_config.memory, mergeable=is_mergeable)
    spec = msgspec.structs.replace(spec, vm_config=msgspec.structs.replace(spec.vm_config, memory=memory))
    machine = engine.build(spec)
    machine.boot()
    machine.pause()

    def call_off(saved):
        if not is_last or saved.bytes == saved.total_bytes:
            raise CalledOff

    with pytest.raises(CalledOff):
        machine.save(str(folder), call_off)
    assert os.listdir(folder) == []

    told = []
    machine.save(str(folder), told.append)
    assert [saved.bytes for saved in told] == sorted(saved.bytes for saved in told)
    assert told[-1].bytes == told[-1].total_bytes > 0
    machine.resume()
    machine.close()
    machine = engine.build(from_origin(spec, SavedIn(str(folder))))
    machine.resume()
    machine.close()


def test_disks_go_on_in_new_images_after_the_guest_was_saved(machine_paused, disk, folder, tmp_path):
    overlay = tmp_path / "overlay.qcow2"
    machine_paused.save(str(folder))
    assert machine_paused.frozen_disks(["_disk0"])["_disk0"].path == str(disk)
    machine_paused.freeze_disks({"_disk0": str(overlay)})
    assert overlay.read_bytes()[:4] == b"QFI\xfb"
    assert machine_paused.frozen_disks(["_disk0"])["_disk0"].path == str(overlay)
    machine_paused.resume()


def test_disks_that_cannot_all_go_on_in_new_images_stay(machine_paused, disk, tmp_path):
    overlay, taken = tmp_path / "overlay.qcow2", tmp_path / "taken"
    taken.touch()
    for overlays in ({"_disk0": str(overlay), "_disk7": str(overlay)}, {"_disk0": str(taken)}):
        with pytest.raises(DeviceError):
            machine_paused.freeze_disks(overlays)
    assert not overlay.exists()
    assert machine_paused.frozen_disks(["_disk0"])["_disk0"].path == str(disk)
    machine_paused.resume()


def test_machine_goes_on_from_what_was_saved(engine, spec, machine_running, player, folder):
    player.wait_ready()
    machine_running.pause()
    machine_running.save(str(folder))
    before = machine_running.counters()
    machine_running.close()

    machine = engine.build(from_origin(spec, SavedIn(str(folder))))
    assert set(machine.counters()) == set(before)
    machine.resume()
    player.ping("again")
    assert player.hears("again", timeout_s=player.ready_timeout_s)
    machine.close()


def test_one_state_serves_many_times(engine, spec, machine_paused, folder):
    machine_paused.save(str(folder))
    before = machine_paused.counters()
    machine_paused.close()
    for _ in range(2):
        machine = engine.build(from_origin(spec, SavedIn(str(folder))))
        assert set(machine.counters()) == set(before)
        machine.resume()
        machine.close()


def test_machine_that_goes_on_is_not_booted(engine, spec, machine_paused, folder):
    machine_paused.save(str(folder))
    machine_paused.close()
    machine = engine.build(from_origin(spec, SavedIn(str(folder))))
    with pytest.raises(EngineError):
        machine.boot()
    machine.close()


@pytest.mark.parametrize("damage", ["nothing", "cut", "other"])
def test_state_that_is_damaged_is_refused_and_nothing_is_left(engine, spec, machine_paused, folder, damage):
    machine_paused.save(str(folder))
    machine_paused.close()
    for name in os.listdir(folder):
        raw = (folder / name).read_bytes()
        contents = {
            "nothing": b"",
            "cut": raw[:-1],
            "other": raw.replace(b"_disk0", b"_disk1").replace(b"ram0", b"ram1"),
        }
        (folder / name).write_bytes(contents[damage])
    before = Holdings()

    with pytest.raises(StateError):
        engine.build(from_origin(spec, SavedIn(str(folder))))
    before.assert_nothing_added()


def test_state_that_is_not_there_is_refused(engine, spec, folder):
    with pytest.raises(StateError):
        engine.build(from_origin(spec, SavedIn(str(folder))))


# Sent


@pytest.mark.parametrize("is_paused", [False, True])
def test_machine_goes_on_from_what_was_sent(engine, spec, machine_running, player, link, is_paused):
    ours, theirs = link
    player.wait_ready()
    for _ in range(is_paused):
        machine_running.pause()
    receiver = Beside(lambda: engine.build(from_origin(spec, ReceivedFrom(theirs.fileno()))))

    machine_running.send(SentTo(link_fd=ours.fileno()))

    machine = receiver.result()
    assert set(machine.counters()) == set(machine_running.counters())
    machine_running.close()
    machine.resume()
    player.ping("there")
    assert player.hears("there", timeout_s=player.ready_timeout_s)
    machine.close()


def test_link_is_lent_and_nothing_but_the_state_is_read(engine, spec, machine_running, link):
    ours, theirs = link
    receiver = Beside(lambda: engine.build(from_origin(spec, ReceivedFrom(theirs.fileno()))))
    machine_running.send(SentTo(link_fd=ours.fileno()))
    receiver.result().close()

    ours.sendall(b"next")
    assert theirs.recv(10) == b"next"


def test_guest_stands_paused_after_a_send_that_failed(machine_running, link):
    ours, theirs = link
    theirs.close()

    with pytest.raises(LinkLost):
        machine_running.send(SentTo(link_fd=ours.fileno()))
    machine_running.resume()


def test_sender_that_is_gone_leaves_nothing(engine, spec, link):
    ours, theirs = link
    ours.sendall(b"\0\0")
    ours.close()
    before = Holdings()

    with pytest.raises(LinkLost):
        engine.build(from_origin(spec, ReceivedFrom(theirs.fileno())))
    before.assert_nothing_added()


@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xff\xff", b"\0\0\0\x02{}\0\0\0\0", b"\0\0\0\x03\xff\xff\xff\0\0\0\0"]
)
def test_sender_that_sends_something_else_is_refused(engine, spec, link, raw):
    ours, theirs = link
    ours.sendall(raw)

    with pytest.raises(StateError):
        engine.build(from_origin(spec, ReceivedFrom(theirs.fileno())))


def test_kill_ends_a_send_under_way(machine_running, link):
    sender = Beside(lambda: machine_running.send(SentTo(link_fd=link[0].fileno())))
    wait_until(lambda: link[1].recv(1, socket.MSG_PEEK), "the state is on its way", timeout_s=SOON_S)

    machine_running.kill()

    with pytest.raises(MachineGone):
        sender.result()


def test_abort_ends_a_build_that_waits_for_its_state(engine, spec, link):
    receiver = Beside(lambda: engine.build(from_origin(spec, ReceivedFrom(link[1].fileno()))))

    def has_ended() -> bool:
        engine.abort_build()
        return receiver.has_ended

    wait_until(has_ended, "the build ends", timeout_s=SOON_S)
    with pytest.raises(MachineGone):
        receiver.result()


# Sent, with memory that follows


@pytest.fixture
def way(engine):
    try:
        engine.check_postcopy(is_receiver=True)
    except NotSupportedYet as error:
        pytest.skip(f"The host does not give what it needs: {error.__cause__ or error}")


def send_early(engine, spec, machine, link):
    """Return the machine that can go on with the guest of `machine`."""
    ours, theirs = link
    receiver = Beside(
        lambda: engine.build(from_origin(spec, ReceivedFrom(theirs.fileno(), is_postcopy=True)))
    )
    machine.send(SentTo(link_fd=ours.fileno(), is_postcopy=True, insist_s=0))
    return receiver.result()


def test_guest_goes_on_while_its_memory_follows(engine, spec, machine_running, player, link, way):
    player.wait_ready()
    machine = send_early(engine, spec, machine_running, link)
    machine.resume()
    rest = Beside(machine.transfer_rest)

    machine_running.transfer_rest()

    rest.result()
    with pytest.raises(EngineError):
        machine_running.resume()
    machine_running.close()
    player.ping("there")
    assert player.hears("there", timeout_s=player.ready_timeout_s)
    machine.close()


def test_guest_that_was_sent_early_and_did_not_go_on_there_goes_on_here(
    engine, spec, machine_running, player, link, way
):
    player.wait_ready()
    send_early(engine, spec, machine_running, link).close()

    machine_running.resume()

    player.ping("here")
    assert player.hears("here", timeout_s=player.ready_timeout_s)


# Forked


@pytest.fixture
def overlays(spec, tmp_path):
    (disk,) = spec.vm_config.disks
    return {disk.id: str(tmp_path / "overlay.qcow2")}


def clone_spec(spec, base, folder):
    """Return the spec of a machine that begins at `base`, with its own overlay."""
    (disk,) = spec.vm_config.disks
    path = str(folder / f"clone-{len(os.listdir(folder))}.qcow2")
    base.make_overlay(disk.id, path)
    own = msgspec.structs.replace(disk, path=path, image_type=ImageType.QCOW2, backing_files=True)
    vm_config = msgspec.structs.replace(spec.vm_config, disks=[own])
    return msgspec.structs.replace(spec, vm_config=vm_config, origin=BeginsAt(base))


def test_machines_begin_where_a_running_one_stands_which_goes_on(
    engine, spec, machine_running, player, overlays, tmp_path
):
    player.wait_ready()
    base = machine_running.fork(overlays)
    assert base.stood_still_s < SOON_S
    player.ping("parent")
    assert player.hears("parent", timeout_s=player.ready_timeout_s)
    machine_running.pause()  # they all have one console

    for word in ("one", "two"):
        machine = engine.another().build(clone_spec(spec, base, tmp_path))
        assert set(machine.counters()) == set(machine_running.counters())
        machine.resume()
        player.ping(word)
        assert player.hears(word, timeout_s=player.ready_timeout_s)
        machine.close()
    base.close()

    machine_running.resume()
    player.ping("again")
    assert player.hears("again", timeout_s=player.ready_timeout_s)


def test_machine_can_begin_after_all_else_is_gone(engine, spec, machine_paused, player, overlays, tmp_path):
    base = machine_paused.fork(overlays)
    machine = engine.build(clone_spec(spec, base, tmp_path))
    machine_paused.close()
    base.close()
    machine.resume()
    machine.pause()
    machine.close()


def test_paused_machine_is_forked_saved_and_forked_again(machine_paused, overlays, folder):
    machine_paused.fork(overlays).close()
    machine_paused.save(str(folder))
    machine_paused.fork({disk_id: f"{path}-2" for disk_id, path in overlays.items()}).close()
    machine_paused.resume()


def test_fork_without_an_overlay_for_each_disk_changes_nothing(machine_running, tmp_path):
    before = Holdings()
    with pytest.raises(EngineError):
        machine_running.fork({})
    before.assert_nothing_added()
    machine_running.pause()


def test_fork_over_a_file_that_exists_changes_nothing(machine_running, overlays):
    (path,) = overlays.values()
    with open(path, "w") as file:
        file.write("mine")
    before = Holdings()
    with pytest.raises(DeviceError):
        machine_running.fork(overlays)
    before.assert_nothing_added()
    with open(path) as file:
        assert file.read() == "mine"
    machine_running.pause()


def test_machine_that_was_not_booted_is_not_forked(machine_built, overlays):
    with pytest.raises(EngineError):
        machine_built.fork(overlays)
    assert not any(map(os.path.exists, overlays.values()))


def test_fork_is_taken_back_with_what_was_written_since(machine_running, player, overlays):
    player.wait_ready()
    base = machine_running.fork(overlays)
    base.close()
    machine_running.take_back(base)
    assert not any(map(os.path.exists, overlays.values()))
    machine_running.fork(overlays).close()
    player.ping("still")
    assert player.hears("still", timeout_s=player.ready_timeout_s)
