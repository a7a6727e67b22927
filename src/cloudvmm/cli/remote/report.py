"""How a failure is shown on standard error: a log line with everything, then the chain, numbered.

The server's own chain continues the numbers of ours. Where an option is at fault, what is allowed follows.
"""

from __future__ import annotations

import sys

from cloudvmm.cli.fatal import fatal_text
from cloudvmm.cli.remote.error import DBusApiClient, HttpApiClient, ServerResponse
from cloudvmm.cli.remote.log import REPORT_TARGET, log_error
from cloudvmm.cli.remote.version import REFERENCE_NAME
from cloudvmm.errors import error_chain


def report(error: BaseException) -> None:
    """Print `error`, its causes, and what the server said of them.

    The first line has the reference's name under any of ours: it is what programs look for, as they look for
    `Cloud Hypervisor exited` in what the VMM prints.
    """
    log_error(fatal_text(error), target=REPORT_TARGET)
    lines = _lines(error)
    if len(lines) == 1:
        sys.stderr.write(f"Error: {REFERENCE_NAME} exited with the following error:\n  {lines[0]}\n")
        return
    sys.stderr.write(f"Error: {REFERENCE_NAME} exited with the following chain of errors:\n")
    sys.stderr.write("".join(f"  {line}\n" for line in lines))
    if (hint := _hint(error)) is not None:
        sys.stderr.write(f"\nAllowed: {hint}\n")


def _lines(error: BaseException) -> list[str]:
    if error.__cause__ is None:
        return [str(error)]
    chain = error_chain(error)
    response = _server_response(error)
    if response is None:
        return _numbered(chain)
    texts = _remote_texts(response)
    if isinstance(texts, str):
        return [*_numbered(chain[:-1]), f"X: {texts}"]
    return _numbered([*chain, *texts])


def _hint(error: BaseException) -> str | None:
    if isinstance(error, (HttpApiClient, DBusApiClient)):
        return None  # it is no option that is at fault
    from cloudvmm.options.error import hint_of

    return hint_of(error)


def _numbered(texts: list[str]) -> list[str]:
    return [f"{number}: {text}" for number, text in enumerate(texts)]


def _server_response(error: BaseException) -> ServerResponse | None:
    current: BaseException | None = error
    while current is not None and not isinstance(current, ServerResponse):
        current = current.__cause__
    return current


def _remote_texts(response: ServerResponse) -> list[str] | str:
    """Return the sentences in the server's answer, or what to say of an answer that has none."""
    import msgspec

    from cloudvmm.config.decode_error import explain

    raw = response.body.encode()
    try:
        return msgspec.json.decode(raw, type=list[str])
    except msgspec.DecodeError as error:
        reason = explain(error, raw, list)
        return f"Can't get remote's error messages from JSON response: {reason}: body='{response.body}'"
