"""What a start loads: whatever it does not need would delay the first answer and stay in memory."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from cloudvmm.cli.flag import Args, parse_args, read_plain
from cloudvmm.cli.parser import build_parser

LATE = (
    "cloudvmm.client",
    "cloudvmm.config",
    "cloudvmm.dbus",
    "cloudvmm.engine",
    "cloudvmm.migration",
    "cloudvmm.options",
    "cloudvmm.snapshot",
    "cloudvmm.vhost",
)
LATE_STEPS = ("hotplug", "resize", "snapshot", "restore", "send", "receive", "coredump")
LATE_PARTS = {
    "cloudvmm.api.action",
    "cloudvmm.api.data",
    "cloudvmm.api.error",
    "cloudvmm.cli.error",
    "cloudvmm.cli.parser",
    "cloudvmm.control.dispatch",
    "cloudvmm.control.journal",
    "cloudvmm.daemon.vmm",
    "cloudvmm.events.monitor",
    "cloudvmm.http.error",
    "cloudvmm.http.route",
    "cloudvmm.http.stream",
}
# Each of them takes as long as a third of an interpreter's start, or longer.
HEAVY = {"argparse", "ast", "datetime", "inspect", "json", "locale", "logging", "msgspec", "re", "typing"}

ASK_AND_TELL = """
import socket, sys, threading, time
from cloudvmm.cli import main, serve

def ask(path):
    client = socket.socket(socket.AF_UNIX)
    while client.connect_ex(path):
        time.sleep(0.001)
    client.sendall(b"GET /api/v1/vmm.ping HTTP/1.1\\r\\n\\r\\n")
    print(client.recv(4096).decode().partition("\\r\\n")[0])
    print(*sys.modules)
    client.sendall(b"PUT /api/v1/vmm.shutdown HTTP/1.1\\r\\n\\r\\n")
    client.recv(4096)

serve.warm_up = lambda *_: None
path = sys.argv[1]
threading.Thread(target=ask, args=(path,), daemon=True).start()
sys.exit(main.main(["--api-socket", path, "--no-shutdown"]))
"""


def output_of(program, *words):
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout


def loaded_by(statements):
    return output_of(f"import sys\n{statements}\nprint(*sys.modules)").split()


def test_first_answer_comes_before_what_only_commands_need(tmp_path):
    status, modules = output_of(ASK_AND_TELL, str(tmp_path / "api")).splitlines()
    loaded = set(modules.split())

    assert status == "HTTP/1.1 200 "
    assert "cloudvmm.control.loop" in loaded
    assert [name for name in loaded if name.startswith(LATE)] == []
    assert loaded & (HEAVY | LATE_PARTS) == set()


WARM = """
import threading
from cloudvmm.cli.serve import warm_up
from cloudvmm.engine.fake import FakeEngine

warm_up(FakeEngine(), lambda *_: None)
[one.join() for one in threading.enumerate() if one.name == "engine-info"]
"""
CREATE_AND_TELL = """
import msgspec
from cloudvmm.api import VmInfo, VmState
from cloudvmm.config import form
from cloudvmm.config.vm import VmConfig

msgspec.json.Decoder = msgspec.defstruct = None
vm_config = form.decode(b'{"payload":{"kernel":"/k"}}', VmConfig)
print(form.encode(VmInfo(config=vm_config, state=VmState.CREATED, memory_actual_size=1)).decode())
"""


def test_first_configuration_finds_what_reads_and_prints_it_ready():
    assert '"state":"Created"' in output_of(WARM + CREATE_AND_TELL)


def test_commands_load_nothing_that_few_vmms_are_asked_for():
    loaded = loaded_by("from cloudvmm.cli.serve import load_commands\nload_commands()")
    assert "cloudvmm.control.command" in loaded
    assert [name for name in loaded if name.startswith(("cloudvmm.migration.", "cloudvmm.engine.qemu"))] == []
    assert [name for name in LATE_STEPS if f"cloudvmm.control.{name}" in loaded] == []


def test_all_steps_are_there_once_they_are_preloaded():
    loaded = loaded_by("from cloudvmm.control.latecomer import preload\npreload()")
    assert [name for name in LATE_STEPS if f"cloudvmm.control.{name}" not in loaded] == []


def test_words_for_a_bad_end_are_there_once_all_is_warm():
    loaded = loaded_by(WARM)
    assert {"cloudvmm.cli.error", "cloudvmm.cli.fatal", "cloudvmm.options.error"} <= set(loaded)


def test_choice_of_an_engine_loads_none():
    choice = "engine.choose_engine(flag.parse_args(['--api-socket', 's'], program='cloudvmm'), None)"
    loaded = loaded_by(f"from cloudvmm.cli import engine, flag; {choice}")
    assert [name for name in loaded if name.startswith(LATE)] == []


WORDS = st.sampled_from(
    [
        *("--api-socket", "--engine", "--no-shutdown", "--state-dir", "--accel", "--dbus-system-bus"),
        *("--kernel", "--disk", "--serial", "--log-file", "--api-socket=s", "--no-shutdown=s", "--engine="),
        *("fake", "qemu", "s", "", "-", "--", "-1", "-v", "-V", "--nothing", "a b", "path=/s"),
        *("--api-socket-peers", "uid=0"),
    ]
)


@given(st.lists(WORDS, max_size=6))
def test_plain_line_is_read_as_the_parser_reads_it(words):
    plain = read_plain(words)
    if plain is not None:
        parser = build_parser("cloudvmm", with_help=False)
        assert parser.parse_words(words, Args()) == plain


def test_line_of_a_vmm_is_plain():
    plain = read_plain(["--engine", "fake", "--api-socket", "/s", "--no-shutdown"])
    assert plain is not None
    assert (plain.engine, plain.api_socket, plain.no_shutdown, plain.log_file) == ("fake", "/s", True, None)
    assert plain.given == {"engine", "api-socket", "no-shutdown"}


def test_flag_of_many_values_is_left_to_the_parser():
    words = ["--api-socket", "/s", "--api-socket-peers", "uid=0"]
    assert read_plain(words) is None
    assert parse_args(words).api_socket_peers == ["uid=0"]


def test_line_of_a_vm_is_left_to_the_parser():
    assert read_plain(["--api-socket", "/s", "--kernel", "k"]) is None
