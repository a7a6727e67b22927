"""The one door to every check: `nox`, or `nox -s lint types layers unit` before a change.

The sessions run in the environment that nox itself is installed in (`./test.sh` makes it as .venv).
CLOUDVMM_LONG=1 adds the tests of large counts, and on the oldest QEMU all but the sample.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.stop_on_first_error = False

BIN = Path(sys.prefix, "bin")
TESTS_FAILED = 1  # pytest's status where all tests ran, and some failed
MOST_UNSTEADY = 2  # tests of a session that get a second try
# Tests that take a QEMU by its version, and tests that take the one on the path.
BY_VERSION = ("test_qemu_accepts_plan.py", "test_device_matrix.py", "test_device_tree.py")
BY_PATH = (
    "test_user_device.py",
    "test_lifecycle.py",
    "test_hotplug.py",
    "test_devices.py",
    "test_driver_events.py",
    "test_snapshot.py",
)


def _run(session: nox.Session, program: str, *args: str, env: dict[str, str] | None = None) -> None:
    session.run(str(BIN / program), *args, env=env, external=True)


def _pytest(session: nox.Session, suite: str, *options: str, env: dict[str, str] | None = None) -> None:
    folder = Path("tests", suite)
    if not any(folder.rglob("test_*.py")):
        session.skip(f"{folder} has no tests yet")
    marks = [] if os.environ.get("CLOUDVMM_LONG") else ["-m", "not long"]
    with tempfile.TemporaryDirectory(prefix="cache-") as cache:
        options = ("-o", f"cache_dir={cache}", *options)
        try:
            _run(session, "pytest", "-q", *marks, *options, str(folder), *session.posargs, env=env)
        except nox.command.CommandFailed as error:
            if error.return_code != TESTS_FAILED or session.posargs:
                raise
            _try_again(session, _failed(cache), *options, env=env)


def _failed(cache: str) -> list[str]:
    """Return the tests that failed."""
    try:
        return list(json.loads(Path(cache, "v", "cache", "lastfailed").read_text()))
    except OSError:
        return []


def _try_again(session: nox.Session, tests: list[str], *options: str, env: dict[str, str] | None) -> None:
    """Run what failed once more, alone: of thousands of tests with real processes one may meet a bad moment.

    What passes then is told of as unsteady. Several failures are no bad moment.
    """
    if not 0 < len(tests) <= MOST_UNSTEADY:
        session.error(f"{len(tests)} tests failed")
    _run(session, "pytest", "-q", *options, "--numprocesses=0", *tests, env=env)
    session.warn(f"UNSTEADY, passed at the second try: {', '.join(tests)}")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and form of every Python file."""
    _run(session, "ruff", "check", ".")
    _run(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types."""
    _run(session, "mypy")


@nox.session
def layers(session: nox.Session) -> None:
    """Rooms import downwards only."""
    _run(session, "lint-imports")


@nox.session
def unit(session: nox.Session) -> None:
    """Rules, grammars and translations; seconds."""
    _pytest(session, "unit")


@nox.session
def contract(session: nox.Session) -> None:
    """Both engines keep their word."""
    _pytest(session, "contract")


@nox.session
def integration(session: nox.Session) -> None:
    """Real QEMU, real guest; file by file on two processors."""
    # Sockets lie in the tests' folders, and their paths may have no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="cv-") as folder:
        spread = ("--numprocesses=2", "--dist=loadfile", f"--basetemp={folder}/t")
        _pytest(session, "integration", *spread, env={"CLOUDVMM_LATENCY_FACTOR": "3"})


@nox.session(default=False)
def newest(session: nox.Session) -> None:
    """What depends on QEMU's version, on the newest QEMU that Debian has; it is fetched into .venv first."""
    root = Path(sys.prefix, "qemu-newest")
    session.run("scripts/new_qemu.sh", str(root), external=True)
    path = os.pathsep.join((str(root / "bin"), os.environ.get("PATH", os.defpath)))
    env = {"CLOUDVMM_TEST_NEW_QEMU": str(root), "PATH": path}
    integration = "tests/integration"
    _run(session, "pytest", "-q", "-k", "newest", *(f"{integration}/{name}" for name in BY_VERSION), env=env)
    _run(session, "pytest", "-q", "tests/contract", *(f"{integration}/{name}" for name in BY_PATH), env=env)


@nox.session
def conformance(session: nox.Session) -> None:
    """An existing client would notice nothing."""
    _pytest(session, "conformance")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Grammars, configuration and QMP hold on mutants: the same ones each time, and others under `--long`.

    `nox -s fuzz -- --seconds 600` searches for ten minutes.
    """
    same = [] if os.environ.get("CLOUDVMM_LONG") else ["--seed", "1", "--runs", "250000"]
    session.run(str(BIN / "python"), "fuzz", *(session.posargs or same), external=True)


@nox.session(default=False)
def fuzz_coverage(session: nox.Session) -> None:
    """The same targets, led by the code that inputs reach; needs atheris: `pip install 'cloudvmm[fuzz]'`.

    `nox -s fuzz_coverage -- --seconds 600` searches each for ten minutes.
    """
    session.run(str(BIN / "python"), "fuzz", "--coverage", *session.posargs, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The site builds without a warning: no dead link, no dead anchor, no page that is left out."""
    _run(session, "mkdocs", "build", "--quiet", "--strict", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def passthrough(session: nox.Session) -> None:
    """Guests get devices of the host, in an emulated machine that has some; it fetches a kernel."""
    _run(session, "pytest", "-q", "tests/lane/test_passthrough.py", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure, print and keep: benches/README.md. `nox -s bench -- --only api_latency` runs one of them."""
    session.run(str(BIN / "python"), "benches/suite.py", "--no-page", *session.posargs, external=True)


@nox.session(default=False)
def soak(session: nox.Session) -> None:
    """VMs under a mixed load: leaks, failures, latency. `nox -s soak -- --engine qemu --seconds 600`."""
    session.run(str(BIN / "python"), "benches/soak.py", *session.posargs, external=True)
