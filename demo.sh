#!/bin/sh
# Set up what is missing, then boot a guest through the REST API and show every step.
#
#     ./demo.sh [--keep]      --keep: leave the VM running and say how to talk to it
set -eu
here=$(cd "$(dirname "$0")" && pwd)
"$here/scripts/setup.sh"
exec "$here/.venv/bin/python" "$here/examples/demo.py" "$@"
