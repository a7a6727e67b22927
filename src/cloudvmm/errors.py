"""The root of every error that cloudvmm raises, and how a chain of causes is read.

An error's text is a sentence with a capital and no full stop. A class without arguments has its
text as its docstring. A text never repeats its cause: the cause is chained (``raise … from …``)
and whoever reports the error prints the whole chain, outermost first.

    VmmError
    ├── api.error.ApiError            one kind per command, and the plumbing's kinds
    ├── config.error.ValidationError  a rule of the configuration is broken
    ├── options.error.OptionError     an option string does not parse
    ├── engine.base.EngineError       what runs the VM refused or failed
    ├── api.error.VmError             the VMM or the VM refused
    ├── vhost.error.VhostError        the other side of a vhost-user back end breaks the rules
    └── host.error.HostError          the operating system refused
"""

from __future__ import annotations


class VmmError(Exception):
    """Root of the tree."""

    def __str__(self) -> str:
        """Give the text handed in, else the first line of the class's docstring."""
        if self.args:
            return super().__str__()
        return (type(self).__doc__ or type(self).__name__).strip().splitlines()[0]


def error_code(error: BaseException) -> str:
    """Return the name of the innermost error of ours in the chain: what a program can act upon.

    The names are part of the contract (docs/errors.md): a class in the tree is renamed with its meaning only.
    """
    code = type(error).__name__
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, VmmError):
            code = type(current).__name__
        current = current.__cause__
    return code


def error_chain(error: BaseException) -> list[str]:
    """Return the text of `error` and of each cause, outermost first.

    Follows explicit causes (``raise … from …``) only: an error raised while handling another one is
    an accident of the code, not a reason that helps a caller.
    """
    texts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        texts.append(_text(current))
        current = current.__cause__
    return texts


def json_text(text: str) -> str:
    """Return `text` as JSON can carry it: a file name that is not UTF-8 has half characters in it."""
    return text.encode(errors="replace").decode()


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where} (os error {error.errno})"
    return str(error) or type(error).__name__
