"""Whatever is written in an option string, it gives a struct or an OptionError."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudvmm.options import console, cpu, device, disk, memory, net, operation, payload, platform, rate_limit
from cloudvmm.options.error import OptionError
from cloudvmm.options.table import SCHEMAS, syntax

PARSERS = {
    "balloon": device.parse_balloon,
    "console": console.parse_console,
    "cpus": cpu.parse_cpus,
    "debug-console": console.parse_debug_console,
    "device": device.parse_device,
    "disk": disk.parse_disk,
    "fs": device.parse_fs,
    "fw-cfg-config": payload.parse_fw_cfg_config,
    "generic-vhost-user": device.parse_generic_vhost_user,
    "ivshmem": device.parse_ivshmem,
    "landlock-rules": platform.parse_landlock_rule,
    "memory": memory.parse_memory,
    "memory-zone": memory.parse_memory_zone,
    "net": net.parse_net,
    "numa": platform.parse_numa,
    "pci-segment": platform.parse_pci_segment,
    "platform": platform.parse_platform,
    "pmem": device.parse_pmem,
    "rate-limit-group": rate_limit.parse_rate_limit_group,
    "restore": operation.parse_restore,
    "rng": device.parse_rng,
    "rtc": device.parse_rtc,
    "serial": console.parse_serial,
    "tpm": device.parse_tpm,
    "user-device": device.parse_user_device,
    "vdpa": device.parse_vdpa,
    "vsock": device.parse_vsock,
}
VALUES = st.text(alphabet='0123456789KMG[],@:-"+xonf \u0663\u00b2', max_size=12)


@pytest.mark.parametrize("flag", sorted(SCHEMAS))
def test_any_string_is_read_or_refused(flag):
    keys = st.sampled_from([key.name for key in SCHEMAS[flag].keys] + list(SCHEMAS[flag].flags) + ["nope"])

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(keys, VALUES), max_size=5))
    def check(options):
        with contextlib.suppress(OptionError):
            PARSERS[flag](",".join(f"{key}={value}" for key, value in options))

    check()


def test_every_flag_with_an_option_string_has_a_parser_and_a_syntax():
    assert set(SCHEMAS) == set(PARSERS)
    assert syntax("serial") == "off|pty|tty|null,file=<path>,socket=<path>"
    assert syntax("kernel") is None
