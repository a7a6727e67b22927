#!/bin/sh
# Unpack the newest QEMU of Debian's suites beside the installed one, for the tests: scripts/new_qemu.sh DIR
#
# DIR/bin/qemu-system-x86_64 is a program that runs it with the libraries and the loader of its own suite, which
# are newer than this release's. Nothing is installed, and apt's own lists are left alone. CLOUDVMM_NEW_SUITE is
# the suite, sid where it is not set; it comes from where this machine's own packages come from.
set -eu
dir=$1
[ ! -x "$dir/bin/qemu-system-x86_64" ] || exit 0
suite=${CLOUDVMM_NEW_SUITE-sid}
release=$(. /etc/os-release && echo "${VERSION_CODENAME-}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"
mkdir -p "$scratch/lists/partial" "$scratch/archives/partial" "$scratch/sources" "$scratch/root"
: >"$scratch/status" # as if nothing were installed: every library comes along
python3 "$(dirname "$0")/backports_source.py" "$release" /etc/apt "$suite" >"$scratch/source"
sources=/etc/apt/sources.list.d # they have the suite already
if [ -s "$scratch/source" ]; then
    sources=$scratch/sources
    tail -n +2 "$scratch/source" >"$sources/$(head -n 1 "$scratch/source")"
fi

apt() {
    apt-get -q -y -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none \
        -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$sources" \
        -o Dir::State::Lists="$scratch/lists" -o Dir::State::Status="$scratch/status" \
        -o Dir::Cache="$scratch" "$@" >"$scratch/log" 2>&1 || {
        cat "$scratch/log" >&2
        exit 1
    }
}

echo "test: fetching the newest QEMU of Debian $suite for the tests" >&2
apt update
apt --no-install-recommends --download-only install qemu-system-x86
for package in "$scratch"/archives/*.deb; do dpkg-deb -x "$package" "$scratch/root"; done
mkdir "$scratch/root/bin" "$scratch/root/loader"
# The loader goes by the name of what it loads, which is then the process's own.
ln -s ../usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 "$scratch/root/loader/qemu-system-x86_64"
cat >"$scratch/root/bin/qemu-system-x86_64" <<'EOF'
#!/bin/sh
root=$(dirname "$(dirname "$0")")
libraries=$root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$libraries/qemu"
exec "$root/loader/qemu-system-x86_64" --library-path "$libraries:$libraries/systemd" \
    "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
EOF
chmod 755 "$scratch/root/bin/qemu-system-x86_64"
"$scratch/root/bin/qemu-system-x86_64" -version >&2
rm -rf "$dir"
mkdir -p "$(dirname "$dir")"
mv "$scratch/root" "$dir"
