"""Completion of the remote's command lines in real shells: half a word, and what comes of it."""

import os
import shutil

import pytest

from cloudvmm.cli.main import main
from support.shell import PROMPT, Shell

START_UP = {
    "bash": """
        bind 'set bell-style none'
        source {folder}/_{name}
        {name}() {{ echo "GOT:$*:"; }}
    """,
    "zsh": """
        unsetopt beep
        fpath=({folder} $fpath)
        autoload -U compinit
        compinit -u -D
        {name}() {{ print -r -- "GOT:$*:" }}
    """,
}
ARGV = {"bash": ["--rcfile", "{start_up}", "-i"], "zsh": ["-d", "-i"]}
TYPED = [
    ("--api-so", "--api-socket"),
    ("add-gen", "add-generic-vhost-user"),
    ("add-disk pat", "add-disk path="),
    ("add-vsock cid=3,sock", "add-vsock cid=3,socket="),
    ("resize --bal", "resize --balloon"),
]


@pytest.mark.parametrize("name", ["cloudvmm-remote", "ch-remote"])
@pytest.mark.parametrize("shell", sorted(START_UP))
def test_tab_completes_subcommands_flags_and_keys(shell, name, tmp_path, capsys):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert main(["completion", shell, name]) == 0
    (tmp_path / f"_{name}").write_text(capsys.readouterr().out)
    start_up = tmp_path / ".zshrc"
    start_up.write_text(START_UP[shell].format(folder=tmp_path, name=name) + f"PS1='{PROMPT}'\n")
    env = {**os.environ, "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path), "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    completed = []
    with Shell([shell, *(word.format(start_up=start_up) for word in ARGV[shell])], env) as terminal:
        for typed, _ in TYPED:
            terminal.wait_for(PROMPT)
            terminal.type(f"{name} {typed}\t\n")
            completed.append(terminal.line_after("GOT:").partition(":")[0])
    assert completed == [wanted for _, wanted in TYPED]
