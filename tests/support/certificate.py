"""Certificates for migrations over TLS, made by the program openssl when they are wanted."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DAYS = 2


class Authority:
    """A certificate authority of its own in `folder`; the certificates that it gives are for `names`.

    Skips the test where there is no openssl.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("The program openssl is missing")
        self._folder = folder
        folder.mkdir()
        kinds = ("IP" if name[0].isdigit() or ":" in name else "DNS" for name in names)
        alternatives = ",".join(f"{kind}:{name}" for kind, name in zip(kinds, names, strict=True))
        request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        self._request = [*request, "-days", str(DAYS)]
        _openssl(
            folder, *self._request, "-subj", "/CN=authority", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"
        )
        for name in ("server", "client"):
            _openssl(
                folder,
                *self._request,
                *("-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-subj", f"/CN={name}"),
                *(
                    "-addext",
                    f"subjectAltName={alternatives}",
                    "-addext",
                    "basicConstraints=critical,CA:FALSE",
                ),
                *("-keyout", f"{name}-key.pem", "-out", f"{name}-cert.pem"),
            )

    @property
    def tls_dir(self) -> str:
        """The folder with what either side needs."""
        return str(self._folder)

    def trusting(self, other: Authority, folder: Path) -> str:
        """Return a folder with the certificates of this authority where that of `other` is trusted."""
        shutil.copytree(self._folder, folder)
        shutil.copyfile(f"{other.tls_dir}/ca-cert.pem", folder / "ca-cert.pem")
        return str(folder)


def _openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)
