"""From a QEMU's own command line to the one that a person would write."""

from __future__ import annotations

import pytest

from by_hand import HandCommand, translate

MONITOR = ["-chardev", "socket,id=qmp.control,fd=7", "-mon", "chardev=qmp.control,mode=control"]
MONITOR_BY_HAND = [
    *("-chardev", "socket,id=qmp.control,path=/f/qmp.control,server=on,wait=off"),
    *("-mon", "chardev=qmp.control,mode=control"),
]


def by_hand(*arguments: str) -> HandCommand:
    words = ["/bin/qemu", *MONITOR, *arguments]
    return translate(words, "/f", renamed={}, path_of=lambda fd: f"/image{fd}")


def test_monitor_becomes_a_socket_path_and_vcpus_run_at_once() -> None:
    command = by_hand("-nodefaults", "-S", "-m", "512")
    assert command.monitor_path == "/f/qmp.control"
    assert command.argv == ["/bin/qemu", *MONITOR_BY_HAND, "-nodefaults", "-m", "512"]
    assert command.paused_argv == [*command.argv, "-S"]


def test_options_of_a_socket_stay() -> None:
    command = by_hand("-chardev", "socket,id=con,fd=9,logfile=/log")
    assert command.argv[-1] == "socket,id=con,path=/f/con,server=on,wait=off,logfile=/log"


def test_descriptor_sets_become_the_paths_of_their_files() -> None:
    sets = [f"fd={fd},set={number}" for fd, number in ((30, 1), (31, 10))]
    command = by_hand(
        *("-add-fd", sets[0], "-add-fd", sets[1]),
        *("-blockdev", "file,filename=/dev/fdset/1", "-blockdev", "file,filename=/dev/fdset/10,x=on"),
    )
    assert command.argv[5:] == [
        *("-blockdev", "file,filename=/image30"),
        *("-blockdev", "file,filename=/image31,x=on"),
    ]


def test_passed_ram_becomes_ram_of_its_own() -> None:
    passed = (
        '{"qom-type":"memory-backend-file","id":"ram0","size":4096,"mem-path":"/proc/self/fd/9","share":true}'
    )
    command = by_hand("-object", passed)
    assert command.argv[-1] == '{"qom-type":"memory-backend-memfd","id":"ram0","size":4096,"share":true}'


def test_ram_in_a_file_stays_there() -> None:
    named = '{"qom-type":"memory-backend-file","id":"ram0","size":4096,"mem-path":"/ram","share":true}'
    assert by_hand("-object", named).argv[-1] == named


def test_ram_on_a_passed_file_is_that_file() -> None:
    passed = '{"qom-type":"memory-backend-file","mem-path":"/proc/self/fd/9","readonly":true}'
    command = translate(
        ["/bin/qemu", *MONITOR, "-object", passed], "/f", renamed={}, path_of=lambda fd: f"/file/{fd}"
    )
    assert command.argv[-1] == '{"qom-type":"memory-backend-file","mem-path":"/file/9","readonly":true}'


def test_path_is_renamed_where_it_stands() -> None:
    words = ["/bin/qemu", *MONITOR, "-chardev", "file,id=s,path=/a/serial,append=on"]
    command = translate(words, "/f", renamed={"/a/serial": "/a/by-hand"}, path_of=str)
    assert command.argv[-1] == "file,id=s,path=/a/by-hand,append=on"


def test_descriptor_that_nobody_can_write_by_hand_is_refused() -> None:
    with pytest.raises(SystemExit, match="passed as a descriptor: .*tap,fd=9,id=n"):
        by_hand("-netdev", "tap,fd=9,id=n")


def test_command_without_a_monitor_is_refused() -> None:
    with pytest.raises(SystemExit, match="no QEMU with a monitor"):
        translate(["/bin/qemu", "-m", "512"], "/f", renamed={}, path_of=str)
