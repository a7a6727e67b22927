"""Get files out of Debian's packages, installed or downloaded, without root.

What is installed is used as it lies; the rest is downloaded with the machine's own apt and
unpacked into a folder of the caller's. If the machine's package lists are empty or stale, a
private copy of them is fetched into that folder, which needs no root either.
"""

from __future__ import annotations

from pathlib import Path

from cloudvmm.guest.error import GuestBuildError, ToolFailed
from cloudvmm.guest.tool import run_tool


class PackageSource:
    """Downloads packages into `folder`; owned by one build, not thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._options: list[str] = []

    def unpack(self, package: str) -> Path:
        """Download `package` and return the folder that holds its files. Blocks for the network.

        :raises GuestBuildError: when apt cannot deliver it.
        """
        downloads = self._folder / "debs" / package
        downloads.mkdir(parents=True)
        self._apt(["apt-get", "-q", "download", package], folder=downloads)
        archives = list(downloads.glob("*.deb"))
        if len(archives) != 1:
            raise GuestBuildError(f"apt-get downloaded {len(archives)} files for the package {package}")
        root = self._folder / "unpacked" / package
        root.mkdir(parents=True)
        run_tool(["dpkg-deb", "-x", str(archives[0]), str(root)], package="dpkg")
        return root

    def real_kernel(self, meta_package: str) -> str:
        """Return the package that `meta_package` stands for ("linux-image-6.1.0-56-cloud-amd64")."""
        text = self._apt(["apt-cache", "depends", meta_package]).decode()
        for line in text.splitlines():
            kind, _, name = line.strip().partition(": ")
            if kind == "Depends" and name.startswith("linux-image-"):
                return name
        raise GuestBuildError(f"The package {meta_package} names no kernel")

    def _apt(self, argv: list[str], *, folder: Path | None = None) -> bytes:
        try:
            return self._run(argv, folder=folder)
        except ToolFailed:
            if self._options:
                raise
        self._fetch_lists()
        return self._run(argv, folder=folder)

    def _run(self, argv: list[str], *, folder: Path | None) -> bytes:
        # Without a sandbox user: apt's own cannot write into a folder of ours, and warns.
        argv = [argv[0], *self._options, "-o", "APT::Sandbox::User=root", *argv[1:]]
        return run_tool(argv, package="apt", folder=folder)

    def _fetch_lists(self) -> None:
        """Fetch package lists of our own; the machine's were no help."""
        state = self._folder / "apt"
        for name in ("state/lists/partial", "cache/archives/partial"):
            (state / name).mkdir(parents=True, exist_ok=True)
        self._options = ["-o", f"Dir::State={state}/state", "-o", f"Dir::Cache={state}/cache"]
        self._options += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        self._run(["apt-get", "-q", "update"], folder=None)


def installed_busybox() -> Path | None:
    """Return the static busybox of this machine, if its package is installed."""
    busybox = Path("/bin/busybox")
    listing = Path("/var/lib/dpkg/info/busybox-static.list")
    return busybox if listing.exists() and busybox.exists() else None


def installed_kernel() -> Path | None:
    """Return the newest installed cloud kernel's image whose modules are installed too."""
    images = sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"), key=lambda path: path.stat().st_mtime)
    for image in reversed(images):
        if Path("/lib/modules", kernel_release(image), "kernel").is_dir():
            return image
    return None


def kernel_release(image: Path) -> str:
    """Return what `uname -r` says under the kernel in the file `image`."""
    return image.name.removeprefix("vmlinuz-")
