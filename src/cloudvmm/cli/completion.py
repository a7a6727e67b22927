"""`cloudvmm completion bash|zsh|fish [cloudvmm-remote]`: what a shell needs to complete our command lines.

shtab writes the scripts, from parsers. It knows nothing of option strings, so each flag that takes one has a
shell function here that offers the keys and words which may come next; the candidates are from the schemas.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import shtab

from cloudvmm.cli.flag import FLAGS, Arity
from cloudvmm.cli.usage import UsageParser
from cloudvmm.options.schema import Schema
from cloudvmm.options.table import OPERATIONS, SCHEMAS
from cloudvmm.options.value import PATH

SHELLS = ("bash", "zsh", "fish")

_REMOTES = ("cloudvmm-remote", "ch-remote")
_FILES = ("kernel", "firmware", "initramfs", "igvm", "log-file", "qemu")
_FOLDERS = ("qemu-cgroup", "state-dir")
_SOCKETS = {"api-socket": ("path", "fd"), "event-monitor": ("path", "fd"), "gdb": ("path",)}


class Words(NamedTuple):
    """What may stand in an option string: `texts`. Of these the keys in `paths` go on with a file name."""

    texts: list[str]
    paths: list[str]


def run_completion(words: list[str], *, program: str) -> int:
    """Carry out `completion SHELL`: print the script for `program`, and return the exit status."""
    parser = UsageParser(prog=f"{program} completion", description="Print a shell's completion script.")
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or fish")
    parser.add_argument(
        "of",
        choices=(program, *_REMOTES),
        nargs="?",
        default=program,
        metavar="PROGRAM",
        help=f"{program} if not given, or {' or '.join(_REMOTES)}",
    )
    parser.add_argument("-h", "--help", action="help", help="Print help")
    args = parser.parse_words(words, argparse.Namespace())
    described = _remote_parser(args.of) if args.of in _REMOTES else _server_parser(args.of)
    sys.stdout.write(script(described[0], args.shell, described[1]))
    return 0


def script(parser: argparse.ArgumentParser, shell: str, option_words: Mapping[argparse.Action, Words]) -> str:
    """Return the script that completes the command line of `parser` in `shell`.

    The actions in `option_words`, of any parser within `parser`, take option strings.
    """
    prefix = f"_{_name_of(parser.prog)}"
    functions = []
    for number, (action, words) in enumerate(option_words.items()):
        function = f"{prefix}_keys_{number}"
        call = f"({function})" if shell == "fish" else function
        action.complete = {shell: call}  # type: ignore[attr-defined]
        functions.append(_KEY_FUNCTION[shell](function, prefix, words))
    preamble = _KEYS[shell].replace("PREFIX_", f"{prefix}_") + "".join(functions)
    text: str = shtab.complete(parser, shell=shell, preamble=preamble)
    if shell == "bash":
        text += (
            _BASH_END.replace("PREFIX_", f"{prefix}_")
            .replace("PROGRAM", parser.prog)
            .replace("SHTAB", f"_shtab_{_name_of(parser.prog)}")
        )
    return text


def words_of(schema: Schema) -> Words:
    """Return every word without a value, every key, and with it each choice that it has."""
    texts = list(schema.flags)
    for key in schema.shown_keys:
        choices = key.kind.choices or ("",)
        texts += [f"{key.name}={choice}" for choice in choices]
    return Words(texts, [key.name for key in schema.shown_keys if key.kind is PATH])


def _server_parser(program: str) -> tuple[argparse.ArgumentParser, dict[argparse.Action, Words]]:
    """The flags as shtab understands them: plain actions, and our own commands beside them."""
    parser = argparse.ArgumentParser(prog=program, description="Launch a VMM", add_help=False)
    option_words: dict[argparse.Action, Words] = {}
    for flag in FLAGS:
        options: dict[str, Any] = {"help": flag.help.replace("%", "%%")}
        if flag.arity is Arity.SWITCH:
            parser.add_argument(f"--{flag.name}", action="store_true", **options)
            continue
        takes_string = flag.name in SCHEMAS or flag.name in _SOCKETS
        # bash splits an option string at its `=`: to shtab these are several words.
        options["nargs"] = "+" if takes_string or flag.arity is Arity.MANY else None
        options["action"] = "append" if flag.arity is Arity.MANY else "store"
        action = parser.add_argument(f"--{flag.name}", choices=flag.choices, **options)
        if flag.name in SCHEMAS:
            option_words[action] = words_of(SCHEMAS[flag.name])
        elif keys := _SOCKETS.get(flag.name):
            option_words[action] = Words([f"{key}=" for key in keys], ["path"])
        elif flag.name in _FILES or flag.name in _FOLDERS:
            action.complete = shtab.FILE if flag.name in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    parser.add_argument("-v", action="count", help="Log more; up to three times")
    parser.add_argument("-V", "--version", action="store_true", help="Print version")
    parser.add_argument("-h", "--help", action="store_true", help="Print help")
    _add_own_commands(parser)
    return parser, option_words


def _remote_parser(program: str) -> tuple[argparse.ArgumentParser, dict[argparse.Action, Words]]:
    from cloudvmm.cli.remote.command import BY_NAME
    from cloudvmm.cli.remote.parser import actions_of, build_parser, option_string_arguments

    parser = build_parser(program)
    option_words = {
        action: words_of(OPERATIONS.get(name) or SCHEMAS[name])
        for action, name in option_string_arguments(parser).items()
    }
    for action in option_words:
        action.nargs = "+"  # for bash, as above
    for action in actions_of(parser):
        if action.dest in ("api_socket", "path"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest == "topic":
            action.choices = list(BY_NAME)
    return parser, option_words


def _add_own_commands(parser: argparse.ArgumentParser) -> None:
    from cloudvmm.cli.guest import add_guest_parser

    commands = parser.add_subparsers(dest="command")
    add_guest_parser(commands)
    completion = commands.add_parser("completion", help="print a shell's completion script")
    completion.add_argument("shell", choices=SHELLS)
    completion.add_argument("of", choices=_REMOTES, nargs="?")


def _name_of(program: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in program)


def _bash_function(name: str, prefix: str, words: Words) -> str:
    return f"{name}() {{\n  {prefix}_keys {_arguments(words)}\n}}\n"


def _zsh_function(name: str, prefix: str, words: Words) -> str:
    return f"{name}() {{\n  {prefix}_keys {_arguments(words)}\n}}\n"


def _fish_function(name: str, prefix: str, words: Words) -> str:
    return f"function {name}\n  {prefix}_keys {_arguments(words)}\nend\n"


def _arguments(words: Words) -> str:
    """Keys that go on with a file name, as one word; then each candidate. All are safe in single quotes."""
    return " ".join(f"'{word}'" for word in (" ".join(words.paths), *words.texts))


_KEY_FUNCTION = {"bash": _bash_function, "zsh": _zsh_function, "fish": _fish_function}

# What is before the last comma stays; what bash itself has split off must not come again.
_BASH_KEYS = r"""
PREFIX_keys() {
  local paths=" $1 " line="${COMP_LINE:0:COMP_POINT}" head="" split="" breaks="${COMP_WORDBREAKS//[^=:]/}"
  shift
  local token="${line##*[[:space:]]}"
  [[ $token == *,* ]] && head="${token%,*},"
  [[ -n $breaks && $token == *["$breaks"]* ]] && split="${token%"${token##*["$breaks"]}"}"
  local rest="${token#"$head"}"
  if [[ $rest == *=* && $paths == *" ${rest%%=*} "* ]]; then
    local found
    while IFS= read -r found; do
      [[ -d $found ]] && found="$found/"
      found="$head${rest%%=*}=$found"
      printf '%s\n' "${found#"$split"}"
    done < <(compgen -f -- "${rest#*=}")
    return
  fi
  local word
  for word in "$@"; do
    [[ $word == "$rest"* ]] && word="$head$word" && printf '%s\n' "${word#"$split"}"
  done
}
"""
# No blank after a key, or where another key may follow.
_BASH_END = r"""
PREFIX_complete() {
  SHTAB "$@"
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=/] ]]; then
    compopt -o nospace 2>/dev/null || :
  fi
}
complete -o bashdefault -F PREFIX_complete PROGRAM
"""
_ZSH_KEYS = r"""
PREFIX_keys() {
  local paths=" $1 "
  shift
  compset -P '*,'
  if [[ $PREFIX == *=* && $paths == *" ${PREFIX%%=*} "* ]]; then
    compset -P '*='
    _files
    return
  fi
  compadd -S '' -- "$@"
}
"""
_FISH_KEYS = r"""
function PREFIX_keys
  set -l paths (string split ' ' -- $argv[1])
  set -l token (commandline -ct)
  set -l head (string match -r '^.*,' -- $token)
  set -l rest (string replace -r '^.*,' '' -- $token)
  set -l parts (string split -m 1 '=' -- $rest)
  if test (count $parts) -eq 2; and contains -- $parts[1] $paths
    for found in (__fish_complete_path $parts[2])
      echo "$head$parts[1]=$found"
    end
    return
  end
  for word in $argv[2..-1]
    echo "$head$word"
  end
end
"""
_KEYS = {"bash": _BASH_KEYS, "zsh": _ZSH_KEYS, "fish": _FISH_KEYS}
