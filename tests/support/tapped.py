"""`cloudvmm` as a program that notes what goes over its connections, for `tap.py` to look at afterwards.

Run as `python -m support.tapped FOLDER FLAG...`. Whatever client speaks to it, its traffic is seen here.
Where a note cannot be written, the rest of its connection is left out: the server must not suffer for it, and
behind a gap nobody can tell which answer is whose.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
from typing import Any

from cloudvmm.cli import main
from cloudvmm.http import server
from cloudvmm.http.connection import Connection
from support.tap import RECEIVED, SENT, note

_numbers = itertools.count()
_folder = ""


class TappedSocket(socket.socket):
    """A connection that notes its bytes. No file is kept open: tests count descriptors."""

    path = ""

    def recvmsg(self, *arguments: Any) -> Any:
        received = super().recvmsg(*arguments)
        self._note(RECEIVED, received[0])
        return received

    def sendall(self, data: Any, *arguments: Any) -> None:
        self._note(SENT, data)
        super().sendall(data, *arguments)

    def _note(self, direction: bytes, raw: bytes) -> None:
        if not self.path:
            return
        try:
            note(self.path, direction, raw)
        except OSError:
            self.path = ""


class TappedConnection(Connection):
    def start(self) -> None:
        # Not before: one that is turned away stays the server's.
        tapped = TappedSocket(fileno=self._client.detach())
        tapped.path = os.path.join(_folder, str(next(_numbers)))
        self._client = tapped
        super().start()


if __name__ == "__main__":
    _folder = sys.argv.pop(1)
    server.Connection = TappedConnection
    sys.exit(main.main())
