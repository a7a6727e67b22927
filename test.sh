#!/bin/sh
# Set up what is missing, then run every check: linters, types, import contracts, all test suites.
#
#     ./test.sh [--long] [SESSION...]      --long: with the tests of large counts
set -eu
cd "$(dirname "$0")"
scripts/setup.sh --dev
old_qemu=$PWD/.venv/qemu-7.2
scripts/old_qemu.sh "$old_qemu"
[ ! -x "$old_qemu/usr/bin/qemu-system-x86_64" ] || export CLOUDVMM_TEST_OLD_QEMU="${CLOUDVMM_TEST_OLD_QEMU-$old_qemu}"
if [ "${1-}" = --long ]; then
    export CLOUDVMM_LONG=1
    shift
fi
# nox without sessions runs all; it goes on after a failure and ends with status 1.
[ $# -eq 0 ] || exec .venv/bin/nox --sessions "$@"
exec .venv/bin/nox
