#!/usr/bin/env bash
# On a GPU machine without a network: runs a command with the wheels and image sets of `.gpu`, which
# pack.py collects. The wheels are installed into a temporary folder; nothing else is changed.
#
#     bash experiments/gpu/start.sh python experiments/gpu/ledger.py --minutes 9
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
packed=$root/.gpu

fail() {
  echo "error: $1" >&2
  exit 1
}

[ $# -gt 0 ] || fail "give a command, e.g. python experiments/gpu/ledger.py --minutes 9"
[ -d "$packed/wheels" ] || fail "there is no $packed/wheels; experiments/gpu/pack.py makes it"

case $1 in
  python*) python=$1 ;;
  *) python=python3 ;;
esac
command -v "$python" >/dev/null || fail "there is no $python"
site=$(mktemp -d)
"$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
  --disable-pip-version-check --target "$site" "$packed"/wheels/*.whl

export PYTHONPATH=$site:$root
[ ! -d "$packed/datasets" ] || export TFDS_DATA_DIR=$packed/datasets
cd "$root"
exec "$@"
