#!/bin/sh
# Make this clone ready to run: Debian packages, the virtual environment .venv, the default guest.
#
#     scripts/setup.sh [--dev]      --dev: with the tools that the tests need
#
# Only what is missing is installed. A stamp in .venv makes the next run a matter of a second.
set -eu
cd "$(dirname "$0")/.."

extra=
[ "${1-}" != --dev ] || extra=dev
stamp=.venv/.cloudvmm-setup

# busybox-static is not here: it would push out busybox; the guest's build downloads it for itself.
packages="qemu-utils seabios ovmf e2fsprogs lz4 zstd iproute2 ca-certificates curl"
[ -z "$extra" ] || packages="$packages zsh fish cpio socat" # completion is tested in two; cpio reads our archives; socat speaks vsock

say() { echo "setup: $*" >&2; }

fail() {
    say "$*"
    exit 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        fail "must install Debian packages; run as root, or install sudo"
    fi
}

key() { cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1; }

is_ready() { # the stamp's words are the key and the extras that are installed
    [ -r "$stamp" ] || return 1
    read -r stamp_key stamp_extra <"$stamp" || true
    [ "$stamp_key" = "$(key)" ] || return 1
    [ -z "$extra" ] || [ "${stamp_extra-}" = "$extra" ]
}

missing_packages() { # print those of "$@" that are not installed
    have=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^installed //p' || true)
    for package; do
        echo "$have" | grep -qx "$package" || printf '%s ' "$package"
    done
}

dev_packages() { # print the packages whose programs the tests call, where those are missing
    command -v dbus-daemon >/dev/null || echo dbus
    command -v gdbus >/dev/null || echo libglib2.0-bin
    command -v busctl >/dev/null || echo systemd
    command -v swtpm >/dev/null || echo swtpm
    command -v gdb >/dev/null || echo gdb-minimal
}

update_lists() {
    say "fetching package lists"
    as_root apt-get -q update >/dev/null 2>&1 && return
    say "fetching package lists failed, once more"
    as_root apt-get -q update >/dev/null
}

install_packages() { # options and names for apt-get install
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends \
        -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 install "$@" >"$log" 2>&1
}

# Make the backports suite of a Debian 12 known to apt. Returns 1 when there is none to be had.
add_backports() {
    derived=$(python3 scripts/backports_source.py bookworm) || return 1
    [ -n "$derived" ] || return 0
    file=/etc/apt/sources.list.d/$(echo "$derived" | head -n 1)
    echo "$derived" | tail -n +2 | as_root tee "$file" >/dev/null
    if ! update_lists || ! apt-cache policy qemu-system-x86 | grep -q bookworm-backports; then
        as_root rm "$file"
        return 1
    fi
}

install_qemu() {
    # shellcheck disable=SC1091
    if [ "$(. /etc/os-release && echo "${VERSION_CODENAME-}")" = bookworm ]; then
        say "installing QEMU 10.0 from bookworm-backports"
        if add_backports && install_packages -t bookworm-backports qemu-system-x86 qemu-utils; then
            return
        fi
        say "that failed; installing the release's own QEMU 7.2"
    else
        say "installing QEMU"
    fi
    install_packages qemu-system-x86 qemu-utils || fail_install
}

fail_install() {
    tail -n 15 "$log" >&2
    fail "apt could not install the packages (above: its last words)"
}

find_python() {
    python=
    for candidate in python3 python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            return
        fi
    done
    return 1
}

install_system() {
    [ -x /usr/bin/apt-get ] || fail "this is no Debian: install QEMU and $packages yourself, then make .venv"
    wanted=$packages
    [ -z "$extra" ] || wanted="$wanted $(dev_packages)"
    find_python || wanted="$wanted python3 python3-venv"
    if [ -n "$python" ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        wanted="$wanted python3-venv"
    fi
    # shellcheck disable=SC2086 # words
    missing=$(missing_packages $wanted)
    has_qemu=yes
    command -v qemu-system-x86_64 >/dev/null || has_qemu=
    [ -n "$missing" ] || [ -z "$has_qemu" ] || return 0
    update_lists || fail "apt cannot fetch its package lists"
    if [ -n "$missing" ]; then
        # QEMU's own tools come with QEMU, from the same suite.
        # shellcheck disable=SC2086
        [ -n "$has_qemu" ] || missing=$(printf '%s\n' $missing | grep -vx -e qemu-utils -e seabios | tr '\n' ' ')
    fi
    if [ -n "$missing" ]; then
        say "installing $missing"
        # shellcheck disable=SC2086
        install_packages $missing || fail_install
    fi
    [ -n "$has_qemu" ] || install_qemu
    find_python || fail "no Python 3.11 or newer to be found"
}

make_environment() {
    say "making .venv${extra:+ with the $extra tools}"
    [ -x .venv/bin/python ] && .venv/bin/python -c '' 2>/dev/null || "$python" -m venv --clear .venv
    # What pip before 25.1 makes of a command imports `re` before anything of ours, and starts slower.
    .venv/bin/python -m pip install -q --retries 5 --disable-pip-version-check "pip>=25.1" ||
        say "pip stays as it is: commands start a little slower"
    .venv/bin/python -m pip install -q --retries 5 --disable-pip-version-check -e ".${extra:+[$extra]}" ||
        fail "pip could not install the package (above: its words)"
    # pip compiles what it copies, and an editable package is not copied. Uncompiled it starts four times slower.
    .venv/bin/python -m compileall -q src
}

if ! is_ready; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    install_system
    make_environment
fi
.venv/bin/cloudvmm guest path >/dev/null 2>&1 || {
    say "building the default guest"
    .venv/bin/cloudvmm guest build >/dev/null
}
is_ready || echo "$(key) $extra" >"$stamp"
