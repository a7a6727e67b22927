"""The one place where an engine is chosen; it is loaded when somebody needs it: the API answers before."""

from __future__ import annotations

import threading

from cloudvmm.cli.flag_value import parse_qemu_cgroup, parse_qemu_user

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cloudvmm.cli.flag import Args
    from cloudvmm.cli.log import Logger
    from cloudvmm.cli.trace.start import StartTrace
    from cloudvmm.config.vm import VmConfig
    from cloudvmm.engine.base import Adopted, Engine, EngineInfo, Machine, MachineSpec, Reach


def choose_engine(args: Args, log: Logger, trace: StartTrace | None = None) -> Engine:
    """Return the engine that the flags ask for; it is a third of all that is imported, and comes later."""

    def load_fake() -> Engine:
        from cloudvmm.engine.fake import FakeEngine

        return FakeEngine()

    def load_qemu() -> Engine:
        from cloudvmm.engine.qemu import QemuEngine

        return QemuEngine(
            binary=args.qemu,
            accel=args.accel,
            has_sandbox=args.seccomp in ("true", "errno"),
            has_landlock=args.qemu_landlock == "true",
            user=user,
            groups=groups,
            warn=log.warn,
        )

    user = parse_qemu_user(args.qemu_user)
    groups = parse_qemu_cgroup(args.qemu_cgroup)
    if groups is not None:
        from cloudvmm.host.cgroup import sweep_groups

        sweep_groups(groups)  # of managers that were killed
    load = load_fake if args.engine == "fake" else load_qemu
    if args.engine != "fake" and args.seccomp == "log":
        log.warn("QEMU's seccomp filter cannot be told to log: there is none")
    load = load if trace is None else trace.loading(load)
    return DeferredEngine(load, outlives_manager=args.engine != "fake")


class DeferredEngine:
    """An `engine.base.Engine`: the one that `load` returns, asked for once. Any thread.

    `outlives_manager` is the engine's, which is asked before it is there.
    """

    def __init__(self, load: Callable[[], Engine], *, outlives_manager: bool = False) -> None:
        self.outlives_manager = outlives_manager
        self._load = load
        self._lock = threading.Lock()
        self._engine: Engine | None = None

    @property
    def info(self) -> EngineInfo:
        return self._loaded().info

    def build(self, spec: MachineSpec) -> Machine:
        return self._loaded().build(spec)

    def adopt(self, state_dir: str) -> Adopted | None:
        return self._loaded().adopt(state_dir)

    def discard(self, state_dir: str) -> None:
        self._loaded().discard(state_dir)

    def check_postcopy(self, *, is_receiver: bool) -> None:
        self._loaded().check_postcopy(is_receiver=is_receiver)

    def reach(self, vm_config: VmConfig) -> Reach:
        return self._loaded().reach(vm_config)

    def another(self) -> Engine:
        return self._loaded().another()

    def abort_build(self) -> None:
        # Called by who must not wait: an engine that is not there yet builds nothing.
        engine = self._engine
        if engine is not None:
            engine.abort_build()

    def _loaded(self) -> Engine:
        with self._lock:
            if self._engine is None:
                self._engine = self._load()
            return self._engine
