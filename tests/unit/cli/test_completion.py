"""Completion in the real shells: a test types half a word, and looks at what the program was started with."""

import os
import shutil
import subprocess

import pytest

from cloudvmm.cli.completion import SHELLS
from cloudvmm.cli.flag import FLAGS
from cloudvmm.cli.main import main
from support.shell import PROMPT, Shell

# How a user's start-up file loads the script, beside a stand-in for the program.
START_UP = {
    "bash": """
        bind 'set bell-style none'
        source {folder}/_{program}
        {program}() {{ echo "GOT:$*:"; }}
    """,
    "zsh": """
        unsetopt beep
        fpath=({folder} $fpath)
        autoload -U compinit
        compinit -u -D
        {program}() {{ print -r -- "GOT:$*:" }}
    """,
}
TYPED = [
    ("--api-so", "--api-socket"),
    ("--disk pat", "--disk path="),
    ("--disk path=/x,spars", "--disk path=/x,sparse=o"),
    ("--disk path=/x,sparse=of", "--disk path=/x,sparse=off"),
    ("--disk path=FOLDER/im", "--disk path=FOLDER/image.raw"),
    ("--disk id=d,path=FOLDER/im", "--disk id=d,path=FOLDER/image.raw"),
    ("--cpus boot=2,core_scheduling=vc", "--cpus boot=2,core_scheduling=vcpu"),
    ("--api-socket pa", "--api-socket path="),
    ("--kernel FOLDER/im", "--kernel FOLDER/image.raw"),
    ("--seccomp er", "--seccomp errno"),
    ("guest bu", "guest build"),
    ("completion fi", "completion fish"),
]
TYPED_REMOTE = [
    ("--api-soc", "--api-socket"),
    ("--api-socket FOLDER/im", "--api-socket FOLDER/image.raw"),
    ("add-gen", "add-generic-vhost-user"),
    ("add-vsock cid=3,sock", "add-vsock cid=3,socket="),
    ("--api-socket /s power", "--api-socket /s power-button"),
    ("--api-socket /s create FOLDER/im", "--api-socket /s create FOLDER/image.raw"),
    ("--api-socket /s add-disk pat", "--api-socket /s add-disk path="),
    ("--api-socket /s add-disk id=d,path=FOLDER/im", "--api-socket /s add-disk id=d,path=FOLDER/image.raw"),
    ("--api-socket /s resize --mem", "--api-socket /s resize --memory"),
    ("help coun", "help counters"),
]
PROGRAMS = {"cloudvmm": TYPED, "cloudvmm-remote": TYPED_REMOTE, "ch-remote": TYPED_REMOTE}


def script(capsys, shell, program="cloudvmm"):
    assert main(["completion", shell, program]) == 0
    return capsys.readouterr().out


def needs(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "image.raw").touch()
    return tmp_path


def interactive(shell, folder, completion, program):
    (folder / f"_{program}").write_text(completion)
    start_up = folder / ".zshrc"
    start_up.write_text(START_UP[shell].format(folder=folder, program=program) + f"PS1='{PROMPT}'\n")
    argv = ["bash", "--rcfile", str(start_up), "-i"] if shell == "bash" else ["zsh", "-d", "-i"]
    env = {**os.environ, "HOME": str(folder), "ZDOTDIR": str(folder), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    return Shell(argv, env)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", sorted(START_UP))
def test_tab_completes_flags_keys_words_and_files(shell, program, folder, capsys):
    needs(shell)
    completed = []
    with interactive(shell, folder, script(capsys, shell, program), program) as terminal:
        for typed, _ in PROGRAMS[program]:
            terminal.wait_for(PROMPT)
            terminal.type(f"{program} {typed.replace('FOLDER', str(folder))}\t\n")
            completed.append(terminal.line_after("GOT:").partition(":")[0])
    assert completed == [wanted.replace("FOLDER", str(folder)) for _, wanted in PROGRAMS[program]]


def fish_offers(folder, completion, line):
    (folder / "completion").write_text(completion)
    env = {**os.environ, "HOME": str(folder), "LC_ALL": "C.UTF-8"}
    ended = subprocess.run(
        ["fish", "--no-config", "-c", f"source {folder}/completion; complete -C $argv[1]", line],
        capture_output=True,
        text=True,
        env=env,
        check=True,
        timeout=30,
    )
    return [offer.split("\t")[0] for offer in ended.stdout.splitlines()]


def common_start(offers):
    first, last = min(offers), max(offers)
    return "".join(
        a
        for index, (a, b) in enumerate(zip(first, last, strict=False))
        if first[: index + 1] == last[: index + 1]
    )


@pytest.mark.parametrize(
    ("program", "typed", "wanted"),
    [(program, *line) for program, lines in PROGRAMS.items() for line in lines],
)
def test_fish_offers_flags_keys_words_and_files(program, typed, wanted, folder, capsys):
    needs("fish")
    typed, wanted = (text.replace("FOLDER", str(folder)) for text in (typed, wanted))
    offers = fish_offers(folder, script(capsys, "fish", program), f"{program} {typed}")
    assert offers
    assert common_start(offers) == wanted.split()[-1]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_flag_is_in_the_script(shell, capsys):
    text = script(capsys, shell)
    mark = "-l {}" if shell == "fish" else "--{}"
    assert [flag.name for flag in FLAGS if mark.format(flag.name) not in text] == []


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_unknown_shell_is_a_usage_error(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["completion", *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
