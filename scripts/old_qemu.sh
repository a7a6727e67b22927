#!/bin/sh
# Unpack the QEMU of the Debian release itself beside the installed one, for the tests: scripts/old_qemu.sh DIR
#
# Debian 12 has QEMU 7.2, the oldest that cloudvmm runs on. Nothing is installed. Without the packages, or where
# the release's own QEMU is the installed one, DIR is not made and the tests that want it say so.
set -eu
dir=$1
# A folder without a QEMU says that it could not be had.
[ ! -d "$dir" ] || exit 0
release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
[ "$release" = bookworm ] || exit 0
command -v apt-get >/dev/null || exit 0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"
echo "test: fetching QEMU 7.2 for the tests" >&2
(
    cd "$scratch"
    for package in qemu-system-x86 qemu-system-common qemu-system-data; do
        # The security archive may hold an older build than the release proper.
        version=$(apt-cache madison "$package" | awk '$3 ~ /^1:7\.2/ {print $3}' | sort -V | tail -n 1)
        apt-get -q download "$package=$version" >/dev/null 2>&1 || exit 1
    done
    for package in *.deb; do dpkg-deb -x "$package" unpacked || exit 1; done
    ./unpacked/usr/bin/qemu-system-x86_64 -L unpacked/usr/share/qemu -version >/dev/null 2>&1
) || {
    echo "test: no QEMU 7.2 to be had, its tests will be skipped; remove $dir to try again" >&2
    mkdir -p "$dir"
    exit 0
}
mkdir -p "$(dirname "$dir")"
rm -rf "$dir"
mv "$scratch/unpacked" "$dir"
