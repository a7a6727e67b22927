"""Errors of snapshots on disk.

SnapshotError
├── SnapshotFileError    a file cannot be made, opened or read; the cause tells why
├── SnapshotUnderWay     another writer is at work in the folder
├── DraftLeft            what another writer left there is not ours to remove
├── StateFormatError     `state.json` is not of this form
│   ├── ForeignState     another program wrote it
│   └── NewerFormat      a later release wrote it
├── DamagedSnapshot      what was written is not what is there
└── OtherEngine          another engine wrote the engine's files
"""

from __future__ import annotations

from cloudvmm.errors import VmmError


class SnapshotError(VmmError):
    """Root of what is wrong with a snapshot on disk."""


class SnapshotFileError(SnapshotError):
    """The text says what was tried with which file."""


class SnapshotUnderWay(SnapshotError):
    def __init__(self, path: str) -> None:
        super().__init__(f"Another snapshot is being written to this directory, in {path}")


class DraftLeft(SnapshotError):
    def __init__(self, path: str) -> None:
        super().__init__(
            f"Another writer left {path}, and whether it still lives cannot be told; remove it if it does not"
        )


class StateFormatError(SnapshotError):
    """Root of a `state.json` of another form."""


class ForeignState(StateFormatError):
    def __init__(self) -> None:
        super().__init__(
            "The snapshot's state.json was not written by cloudvmm; snapshots of other programs cannot be "
            "restored"
        )


class NewerFormat(StateFormatError):
    def __init__(self, found: int, known: int) -> None:
        super().__init__(
            f"The snapshot's state.json has format {found}, this release reads {known}; restore it with the "
            "release that wrote it"
        )


class DamagedSnapshot(SnapshotError):
    def __init__(self, what: str) -> None:
        super().__init__(f"The snapshot is damaged: {what}")


class OtherEngine(SnapshotError):
    def __init__(self, wrote: str, runs: str) -> None:
        super().__init__(f"The snapshot was taken with the engine {wrote} and cannot be restored by {runs}")
