#!/bin/sh
# Measure everything beside its peers and write docs/performance.md: `./bench.sh --help` tells the options.
#
#     ./bench.sh [--quick] [--only NAME]... [--resume] [--cloud-hypervisor PATH]
#
# What is missing is installed first: QEMU and the guest, matplotlib for the plots, libvirt as a peer.
set -eu
cd "$(dirname "$0")"

say() { echo "bench: $*" >&2; }

install_libvirt() { # without it, the benchmarks say that it was not measured
    [ -x /usr/bin/apt-get ] && [ "$(id -u)" = 0 ] || return 1
    apt-get -q update >/dev/null 2>&1 || true
    DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends -o Dpkg::Use-Pty=0 \
        install libvirt-daemon libvirt-clients >/dev/null 2>&1
}

scripts/setup.sh
.venv/bin/python -c 'import jsonschema_rs, matplotlib' 2>/dev/null || {
    say "installing what checks answers and draws plots"
    .venv/bin/python -m pip install -q --retries 5 --disable-pip-version-check -e '.[bench]'
}
.venv/bin/python benches/peer_libvirt.py || {
    say "installing libvirt"
    install_libvirt || say "libvirt cannot be had, and is left out: install libvirt-daemon and libvirt-clients as root"
}
exec .venv/bin/python benches/suite.py "$@"
