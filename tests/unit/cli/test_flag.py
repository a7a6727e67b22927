"""The command line's own form: which flags, how often, which need which."""

import pwd

import pytest

from cloudvmm.cli.error import (
    BareEventMonitor,
    FlagError,
    ParsingApiSocket,
    ParsingEventMonitor,
    ParsingMaxConnections,
    ParsingQemuCgroup,
    ParsingQemuUser,
    UpgradeNeedsPath,
    UpgradeTakesNoVm,
)
from cloudvmm.cli.flag import (
    FLAGS,
    Arity,
    check_dbus,
    check_upgrade,
    parse_args,
    version_text,
    wants_vm,
)
from cloudvmm.cli.flag_value import (
    parse_api_socket,
    parse_event_monitor,
    parse_gdb,
    parse_max_connections,
    parse_qemu_cgroup,
    parse_qemu_user,
)
from cloudvmm.errors import error_chain
from cloudvmm.host.user import User
from cloudvmm.options.table import SCHEMAS, syntax

OURS = {
    "accel",
    "api-socket-peers",
    "engine",
    "max-connections",
    "qemu",
    "qemu-landlock",
    "qemu-cgroup",
    "qemu-user",
    "state-dir",
    "trace",
}
# cli.md section 2
REFERENCE = {
    "api-socket",
    "balloon",
    "cmdline",
    "console",
    "cpus",
    "dbus-object-path",
    "dbus-service-name",
    "dbus-system-bus",
    "debug-console",
    "device",
    "disk",
    "event-monitor",
    "firmware",
    "fs",
    "fw-cfg-config",
    "gdb",
    "generic-vhost-user",
    "host-data",
    "igvm",
    "initramfs",
    "ivshmem",
    "kernel",
    "landlock",
    "landlock-rules",
    "log-file",
    "log-format",
    "memory",
    "memory-zone",
    "net",
    "no-shutdown",
    "numa",
    "pci-segment",
    "platform",
    "pmem",
    "pvmemcontrol",
    "pvpanic",
    "rate-limit-group",
    "restore",
    "rng",
    "rtc",
    "seccomp",
    "serial",
    "tpm",
    "user-device",
    "vdpa",
    "vsock",
    "watchdog",
}


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_flags_are_the_references_and_ours():
    assert {flag.name for flag in FLAGS} == REFERENCE | OURS


def test_defaults_are_the_references():
    args = parse_args(["--api-socket", "/s"])
    assert (args.cpus, args.memory) == ("boot=1,max_phys_bits=46", "size=512M")
    assert (args.console, args.serial, args.debug_console) == ("tty", "null", "off,iobase=0xe9")
    assert (args.rng, args.seccomp, args.v) == ("src=/dev/urandom", "true", 0)
    assert (args.engine, args.accel, args.qemu, args.state_dir) == ("qemu", "auto", None, None)
    assert (args.disk, args.rtc, args.watchdog, args.given) == (None, None, False, {"api-socket"})
    assert not wants_vm(args)


def test_repeatable_flag_takes_several_values_and_several_uses():
    args = parse_args(["--kernel", "k", "--disk", "a", "b", "--net", "n", "--disk", "c"])
    assert args.disk == ["a", "b", "c"]
    assert args.net == ["n"]
    assert wants_vm(args)


@pytest.mark.parametrize(("argv", "value"), [(["--rtc"], ""), (["--rtc", "id=r"], "id=r"), ([], None)])
def test_rtc_takes_no_value_or_one(argv, value):
    assert parse_args(["--kernel", "k", *argv]).rtc == value


@pytest.mark.parametrize(("argv", "count"), [(["-v"], 1), (["-vv"], 2), (["-v", "-v", "-v"], 3)])
def test_verbosity_is_counted(argv, count):
    assert parse_args(argv).v == count


def test_no_flag_at_all_prints_help_and_exits_2(capsys):
    assert "--api-socket" in usage_error(capsys)


def test_help_lists_flags_alphabetically_with_their_keys(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n  --{flag.name} ".rstrip()) for flag in FLAGS]
    assert caught.value.code == 0
    assert places == sorted(places)
    assert "lock_granularity=byte-range|full" in "".join(text.split())
    assert "_disable_aio" not in text


@pytest.mark.parametrize(("program", "is_told"), [("cloudvmm", True), ("cloud-hypervisor", False)])
def test_help_tells_of_our_own_commands_under_our_own_name(capsys, program, is_told):
    with pytest.raises(SystemExit):
        parse_args(["--help"], program=program)
    text = " ".join(capsys.readouterr().out.split())
    assert [f"cloudvmm {command}" in text for command in ("guest", "completion")] == [is_told] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cpus", "a", "--cpus", "b"], "the argument '--cpus <cpus>' cannot be used multiple times"),
        (["--rtc", "--rtc"], "the argument '--rtc [<rtc>]' cannot be used multiple times"),
        (["--watchdog", "--watchdog"], "the argument '--watchdog' cannot be used multiple times"),
        (["--kernel", "k", "stray"], "unexpected argument 'stray' found"),
        (["--nothing-like-it=5"], "unexpected argument '--nothing-like-it' found"),
        (
            ["--kernel", "k", "--watchdog=on"],
            "unexpected value 'on' for '--watchdog' found; no more were expected",
        ),
        (["--kernel", "\udcff"], "invalid UTF-8 was detected in one or more arguments"),
        (
            ["--kernel", "k", "--disk", "path=/d,serial=\udcff"],
            "invalid UTF-8 was detected in one or more arguments",
        ),
        (["--bogus"], "unexpected argument '--bogus' found"),
        (["-x"], "unexpected argument '-x' found"),
    ],
)
def test_usage_error_reads_like_claps_and_exits_2(capsys, argv, message):
    tail = "Usage: cloudvmm [OPTIONS]\n\nFor more information, try '--help'.\n"
    assert usage_error(capsys, *argv) == f"error: {message}\n\n{tail}"


SECCOMP = "[possible values: true, false, log, errno]"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--seccomp", "maybe"], f"invalid value 'maybe' for '--seccomp <seccomp>'\n  {SECCOMP}"),
        (
            ["--engine", "bhyve"],
            "invalid value 'bhyve' for '--engine <engine>'\n  [possible values: qemu, fake]",
        ),
        (["--kernel"], "a value is required for '--kernel <kernel>' but none was supplied"),
        (["--kernel", "k", "--disk"], "a value is required for '--disk <disk>...' but none was supplied"),
        (
            ["--seccomp"],
            f"a value is required for '--seccomp <seccomp>' but none was supplied\n  {SECCOMP}",
        ),
        (
            ["--seccomp="],
            f"a value is required for '--seccomp <seccomp>' but none was supplied\n  {SECCOMP}",
        ),
    ],
)
def test_usage_error_about_a_value_shows_no_usage(capsys, argv, message):
    assert usage_error(capsys, *argv) == f"error: {message}\n\nFor more information, try '--help'.\n"


def test_misspelt_flag_is_told_what_it_resembles(capsys):
    assert usage_error(capsys, "--api-sock", "/s").startswith(
        "error: unexpected argument '--api-sock' found\n\n  tip: a similar argument exists: '--api-socket'\n"
    )


PAYLOADS = "<--firmware <firmware>|--fw-cfg-config <fw-cfg-config>|--igvm <igvm>|--kernel <kernel>>"


@pytest.mark.parametrize(
    ("argv", "used"),
    [
        (["--disk", "path=/d"], "--disk <disk>..."),
        (["--api-socket", "/s", "--cpus", "boot=1", "--rtc"], "--cpus <cpus> --rtc [<rtc>]"),
        (["--landlock", "--restore", "source_url=u"], "--landlock"),
    ],
)
def test_flag_of_a_vm_without_a_payload_exits_2(capsys, argv, used):
    assert usage_error(capsys, *argv) == (
        f"error: the following required arguments were not provided:\n  {PAYLOADS}\n\n"
        f"Usage: cloudvmm {used} {PAYLOADS}\n\nFor more information, try '--help'.\n"
    )


@pytest.mark.parametrize("payload", ["--kernel", "--firmware", "--igvm", "--fw-cfg-config"])
def test_payload_flag_lets_vm_flags_through(payload):
    assert parse_args([payload, "x", "--watchdog"]).watchdog


def test_fw_cfg_config_alone_starts_no_vm():
    assert not wants_vm(parse_args(["--fw-cfg-config", "e820=on"]))


@pytest.mark.parametrize(
    ("text", "chain"),
    [
        ("/g", ["Error parsing --gdb", "Unknown option: /g"]),
        ("path", ["Error parsing --gdb", "Invalid syntax: path"]),
        ("", ["Error parsing --gdb: path required"]),
        ("path=", ["Error parsing --gdb: path required"]),
    ],
)
def test_gdb_without_a_path_is_refused_as_such(text, chain):
    with pytest.raises(FlagError) as caught:
        parse_gdb(text)
    assert error_chain(caught.value) == chain


def test_gdb_has_a_path():
    assert parse_gdb("path=/g") == "/g"


@pytest.mark.parametrize("value", ["true", "false", "log", "errno"])
def test_every_value_of_seccomp_is_taken(value):
    assert parse_args(["--seccomp", value]).seccomp == value


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.arity is Arity.MANY])
def test_repeatable_flag_takes_values_side_by_side_and_apart(flag):
    name = f"--{flag.name}"
    args = parse_args(["--kernel", "k", name, "a", "b", "-v", name, "c", f"{name}=d"])
    assert getattr(args, flag.name.replace("-", "_")) == ["a", "b", "c", "d"]


def test_help_shows_the_syntax_of_every_option_string(capsys):
    with pytest.raises(SystemExit):
        parse_args(["-h"])
    text = "".join(capsys.readouterr().out.split())
    assert [name for name in SCHEMAS if "".join((syntax(name) or "").split()) not in text] == []


@pytest.mark.parametrize(
    ("argv", "is_wanted"),
    [
        (["--api-socket", "s"], False),
        (["--dbus-system-bus"], False),
        (["--dbus-service-name", "a.b", "--dbus-object-path", "/a"], True),
    ],
)
def test_dbus_is_served_where_both_its_names_are_given(argv, is_wanted):
    assert check_dbus(parse_args(argv)) == is_wanted


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--dbus-service-name", "a.b"], "`--dbus-object-path` option isn't provided"),
        (["--dbus-object-path", "/a"], "`--dbus-service-name` option isn't provided"),
    ],
)
def test_one_name_of_dbus_without_the_other_is_refused(argv, text):
    with pytest.raises(FlagError, match=f"^{text}$"):
        check_dbus(parse_args(argv))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("path=/s", "/s"),
        ("fd=3", 3),
        ("path=/s,fd=3", 3),
        ("/run/s.sock", "/run/s.sock"),
        ("path=/s,nope=1", "/s"),
        ("a=b", "a=b"),
        ("path=", "path="),
    ],
)
def test_api_socket_is_a_path_or_a_descriptor(text, target):
    assert parse_api_socket(text) == target


def test_api_socket_with_a_descriptor_that_is_no_number_is_refused():
    with pytest.raises(ParsingApiSocket) as caught:
        parse_api_socket("fd=x")
    assert error_chain(caught.value) == ["Error parsing --api-socket", "invalid digit found in string"]


@pytest.mark.parametrize(("text", "target"), [("path=/e", "/e"), ("fd=4", 4), ("path=/e,fd=4", 4)])
def test_event_monitor_is_a_path_or_a_descriptor(text, target):
    assert parse_event_monitor(text) == target


@pytest.mark.parametrize(
    ("text", "kind", "chain"),
    [
        ("", BareEventMonitor, ["Error parsing --event-monitor: path or fd required"]),
        ("path=", BareEventMonitor, ["Error parsing --event-monitor: path or fd required"]),
        ("/e", ParsingEventMonitor, ["Error parsing --event-monitor", "Unknown option: /e"]),
        ("fd=x", ParsingEventMonitor, ["Error parsing --event-monitor", "Unable to convert x for fd"]),
        ("fd=-1", ParsingEventMonitor, ["Error parsing --event-monitor", "Unable to convert -1 for fd"]),
    ],
)
def test_event_monitor_without_a_target_is_refused(text, kind, chain):
    with pytest.raises(kind) as caught:
        parse_event_monitor(text)
    assert error_chain(caught.value) == chain


def test_version_is_printed_as_clients_parse_it():
    assert parse_args(["--version", "-v"]).version
    text = version_text("v54.0.0", program="cloud-hypervisor", features=["io_uring", "kvm"], verbosity=0)
    assert text == "cloud-hypervisor v54.0.0\nMigration Protocol Versions: 0\n"
    text = version_text("v54.0.0", program="cloud-hypervisor", features=["io_uring", "kvm"], verbosity=1)
    assert text.endswith('\nEnabled features: ["io_uring", "kvm"]\n')


@pytest.mark.parametrize(("text", "count"), [("1", 1), ("10", 10), ("4096", 4096)])
def test_max_connections_is_a_count(text, count):
    assert parse_max_connections(text) == count


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0", "0 is not in the range from 1 to 4096"),
        ("4097", "4097 is not in the range from 1 to 4096"),
        ("", "invalid digit found in string"),
        ("-1", "invalid digit found in string"),
        ("ten", "invalid digit found in string"),
    ],
)
def test_max_connections_that_is_none_is_refused_with_the_reason(text, why):
    with pytest.raises(ParsingMaxConnections) as caught:
        parse_max_connections(text)
    assert error_chain(caught.value) == ["Error parsing --max-connections", why]


@pytest.mark.parametrize("words", [[], ["--qemu", "/q", "--state-dir", "/s", "--no-shutdown", "-v"]])
def test_upgrade_takes_the_flags_of_a_vmm(words):
    check_upgrade(parse_args(["--api-socket", "/a", *words]), "/a")


@pytest.mark.parametrize("api_socket", [None, 3])
def test_upgrade_needs_the_path_of_a_socket(api_socket):
    with pytest.raises(UpgradeNeedsPath):
        check_upgrade(parse_args(["--api-socket", "/a"]), api_socket)


@pytest.mark.parametrize(
    ("flag", "words"),
    [("kernel", ["/k"]), ("cpus", ["boot=1", "--kernel", "/k"]), ("restore", ["source_url=file:///s"])],
)
def test_upgrade_takes_no_vm_of_its_own(flag, words):
    with pytest.raises(UpgradeTakesNoVm, match=f"--(kernel|{flag}) does not go with it"):
        check_upgrade(parse_args(["--api-socket", "/a", f"--{flag}", *words]), "/a")


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("auto", "auto"),
        ("root", "root"),
        ("0", User(0, 0)),
        ("2013265921", User(2013265921, 2013265921)),
        ("nobody", User(pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)),
        (str(pwd.getpwnam("nobody").pw_uid), User(*pwd.getpwnam("nobody")[2:4])),
    ],
)
def test_user_of_qemu_is_a_word_a_name_or_a_number(text, user):
    assert parse_qemu_user(text) == user


@pytest.mark.parametrize("text", ["", "no such user", "-1", "4294967295", "99999999999", "\u0663", "a\0b"])
def test_user_of_qemu_that_there_is_not_is_refused(text):
    with pytest.raises(ParsingQemuUser):
        parse_qemu_user(text)


@pytest.mark.parametrize("text", ["", "groups", "./groups", "/a\0b", "/no such folder", "/usr"])
def test_folder_that_is_none_of_control_groups_is_refused(text):
    with pytest.raises(ParsingQemuCgroup):
        parse_qemu_cgroup(text)
