"""What settings do to a boot, to memory and to a restore: each beside the same guest without the setting.

All take turns, and a ratio is the median of those of the turns. A boot is create and boot to the guest's
ready line; memory is what QEMU and the guest's RAM take two seconds later, with nothing to do, in the first
turn. A restore goes to the guest's first word, of a guest with an eighth of its memory written to.
docs/profiles.md is made of this.

    python benches/profiles.py [--runs N] [--json FILE]
"""

from __future__ import annotations

import contextlib
import gzip
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bed import running_server
from boot import qemu_of, wait_ready
from cloudvmm.guest import FAST_CMDLINE, locate
from growth import with_disks
from guest import KERNEL_CMDLINE, bench_config, engine_flags
from harness import RATIO, Report, Series, bench_parser, format_number, paired_ratio, ratio
from restore import IDLE_S, MIB, Bench, own_mib, wait_word
from support.vmm import Vmm

BASE = "the guest of the benchmarks"
RESTORE_MIB = 1024
ON_DEMAND = "`OnDemand`"
RESTORES: dict[str, dict[str, Any]] = {
    ON_DEMAND: {"memory_restore_mode": "OnDemand"},
    "`Copy`": {"memory_restore_mode": "Copy"},
    "`Copy` and `prefault`": {"memory_restore_mode": "Copy", "prefault": True},
}
COLD = "`OnDemand`, nothing of the snapshot in memory"
HEAD = ("Setting", "Median", "Ratio", "Spread")


def boots(folder: str) -> dict[str, dict[str, Any]]:
    """Return the configs to be booted, by what is said of them; the first is what they differ from."""
    base = bench_config("qemu", folder)
    memory = base["memory"]

    def payload(**members: str) -> dict[str, Any]:
        return {"payload": {**base["payload"], **members}}

    def balloon(**members: Any) -> dict[str, Any]:
        return base | {"balloon": {"size": 0, **members}}

    return {
        BASE: base,
        "all that makes it fast: the command line of the default guest, no serial port": base
        | payload(cmdline=_on_console(FAST_CMDLINE))
        | _console(folder),
        "the command line of the default guest": base | payload(cmdline=FAST_CMDLINE),
        "a virtio console in place of the serial port": base
        | payload(cmdline=_on_console(KERNEL_CMDLINE))
        | _console(folder),
        "without `quiet`": base | payload(cmdline=KERNEL_CMDLINE.replace(" quiet", "")),
        "a packed kernel (`bzImage`)": base | payload(kernel=locate().bzimage),
        "a packed initramfs (gzip)": base | payload(initramfs=_packed(base["payload"]["initramfs"], folder)),
        "8 disks": with_disks(folder, 8),
        "`vmgenid`": base | {"platform": {"vmgenid": "auto"}},
        "2 vCPUs": base | {"cpus": {"boot_vcpus": 2, "max_vcpus": 2}},
        "8 GiB of RAM": base | {"memory": {"size": 8192 * MIB}},
        "128 MiB of RAM": base | {"memory": {"size": 128 * MIB}},
        "`prefault`": base | {"memory": {**memory, "prefault": True}},
        '`"shared": false`': base | {"memory": {**memory, "shared": False}},
        "a balloon with `free_page_reporting`": balloon(free_page_reporting=True),
    }


def _console(folder: str) -> dict[str, Any]:
    return {"serial": {"mode": "Off"}, "console": {"mode": "File", "file": os.path.join(folder, "console")}}


def _on_console(cmdline: str) -> str:
    return cmdline.replace("console=ttyS0", "console=hvc0")


def _packed(path: str, folder: str) -> str:
    packed = Path(folder, "initramfs.gz")
    if not packed.exists():
        packed.write_bytes(gzip.compress(Path(path).read_bytes(), mtime=0))
    return str(packed)


def boot(vmm: Vmm, config: dict[str, Any], ready: Series, *, look: Callable[[], None] | None = None) -> None:
    """Boot and delete; `look` is done when the guest has been ready for a while."""
    log = Path(config["serial"].get("file") or config["console"]["file"])
    log.unlink(missing_ok=True)
    started = time.monotonic()
    vmm.put("vm.create", config)
    vmm.put("vm.boot")
    wait_ready(log)
    ready.add(time.monotonic() - started)
    if look is not None:
        time.sleep(IDLE_S)
        look()
    vmm.put("vm.delete")


def measure_boots(report: Report, runs: int) -> Series:
    """Return what the guest takes that all others differ from."""
    with _server() as (folder, server_pid, vmm):
        configs = boots(folder)
        ready = {name: Series(f"boot: {name}", "s") for name in configs}
        memory = {name: Series(f"memory: {name}", "MiB") for name in configs}
        boot(vmm, configs[BASE], Series("", "s"))  # not counted
        for number in range(runs):
            for name, config in configs.items():

                def look(found: Series = memory[name]) -> None:
                    found.add(own_mib(qemu_of(server_pid), sharers=1))

                boot(vmm, config, ready[name], look=None if number else look)
    report.add(*ready.values(), *memory.values())
    tell(report, "Create and boot to ready", ready, BASE)
    tell(report, "Memory of an idle guest", memory, BASE)
    return ready[BASE]


def measure_restores(report: Report, runs: int, booted: Series) -> None:
    with _server() as (folder, server_pid, vmm):
        bench = Bench(folder, RESTORE_MIB)
        bench.save(vmm)
        options = {**RESTORES, COLD: RESTORES[ON_DEMAND]}
        word = {name: Series(f"restore: {name}", "ms") for name in options}
        memory = {name: Series(f"memory after a restore: {name}", "MiB") for name in RESTORES}
        for number in range(runs + 1):
            for name, members in options.items():
                if name == COLD:
                    _forget(Path(bench.snapshot("busy")))
                took_ms = restore(vmm, bench, members)
                if number:  # the first brings files into the page cache
                    word[name].add(took_ms)
                elif name in memory:
                    time.sleep(IDLE_S)
                    memory[name].add(own_mib(qemu_of(server_pid), sharers=1))
                vmm.put("vm.delete")
    report.add(*word.values(), *memory.values())
    tell(report, f"Restore of {RESTORE_MIB} MiB to the guest's word", word, ON_DEMAND)
    tell(report, "Memory of a guest that was restored", memory, ON_DEMAND)
    name = f"a restore {ON_DEMAND}, over a boot"
    report.ratios[name] = ratio(word[ON_DEMAND], booted) / 1000
    report.tabulate(
        "In place of a boot", ("Setting", "Ratio"), [(name, f"{report.ratios[name]:.2f} {RATIO}")]
    )


def restore(vmm: Vmm, bench: Bench, members: dict[str, Any]) -> float:
    """Return the milliseconds to the guest's word; the VM is left running."""
    bench.log.unlink(missing_ok=True)
    url = f"file://{bench.snapshot('busy')}"
    started = time.monotonic()
    vmm.put("vm.restore", {"source_url": url, "resume": True, **members})
    wait_word(bench.log)
    return (time.monotonic() - started) * 1000


def _forget(folder: Path) -> None:
    """Have the kernel read the files in `folder` anew; where they lie in memory alone it keeps them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tell(report: Report, title: str, found: dict[str, Series], base: str) -> None:
    """Tabulate `found`, the best first, each beside `base`."""
    ratios = {name: paired_ratio(series, found[base]) for name, series in found.items()}
    for name, value in ratios.items():
        if name != base:
            report.ratios[f"{found[name].name}, over {base}"] = value
    rows = []
    for name in sorted(found, key=ratios.__getitem__):
        one = found[name]
        median = f"{format_number(one.median)} {one.unit}"
        rows.append((name, median, f"{ratios[name]:.2f} {RATIO}", f"{one.spread:.0%}"))
    report.tabulate(title, HEAD, rows)


@contextlib.contextmanager
def _server() -> Iterator[tuple[str, int, Vmm]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(folder, engine_flags("qemu")) as (server, vmm),
    ):
        yield folder, server.pid, vmm


def main() -> None:
    options = bench_parser(__doc__, runs=5).parse_args()
    report = Report("Settings, each beside the same guest without it")
    booted = measure_boots(report, options.runs)
    measure_restores(report, options.runs, booted)
    report.publish(options.json)


if __name__ == "__main__":
    main()
