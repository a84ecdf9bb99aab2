# Sourced by the other scripts: a virtual environment in .venv with this project in it. Quick when nothing changed.
# Usage: source scripts/setup.sh EXTRAS          (PYTHON chooses the interpreter; VENV the folder)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
stamp="$VENV/.installed-$(printf '%s' "$1" | tr ',' '-')"
wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
    echo "installing into $VENV (a few minutes the first time) ..."
    # the constraints pin versions that were tested together; the torch pin takes a CPU or a CUDA build, whichever is offered
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$1]" 2> >(grep -v '^WARNING: ' >&2)
    printf '%s' "$wanted" > "$stamp"
fi
