#!/usr/bin/env bash
# The package as users get it: builds the sdist and a wheel from it, installs that in an empty environment, tries it far
# from the repository.
# Usage: scripts/wheel.sh [FOLDER]      PYTHON chooses the interpreter; with BORROW=1 the libraries it has are used, too
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="$(command -v "${PYTHON:-python3}")"
folder="$(realpath "${1:-$(mktemp -d)}")"
constraints=${CONSTRAINTS-$PWD/constraints.txt}
mkdir -p "$folder/source" "$folder/elsewhere" "$folder/dist"
# a build leaves files beside its source
cp -r lit_bilevel configs setup.py MANIFEST.in pyproject.toml README.md CHANGELOG.md constraints.txt LICENSE "$folder/source"
isolation=() where='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -m venv "$folder/venv"
builder="$folder/venv/bin/python"
if [ -n "${BORROW:-}" ]; then
    isolation=(--no-build-isolation)
    "$python" -c "$where" > "$("$folder/venv/bin/python" -c "$where")/borrowed.pth"
    libraries=(--no-deps) builder="$python"
else
    libraries=(${constraints:+--constraint "$constraints"})
    "$builder" -m pip install --quiet --disable-pip-version-check --upgrade pip "setuptools>=77"
fi
(cd "$folder/source" && "$builder" -c 'from setuptools import build_meta; build_meta.build_sdist("../dist")' > ../sdist.log 2>&1)
"$builder" -m pip wheel --quiet --disable-pip-version-check --no-deps "${isolation[@]}" --wheel-dir "$folder/dist" "$folder"/dist/*.tar.gz
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${libraries[@]}" "$folder"/dist/*.whl
cd "$folder/elsewhere"
export PYTHONPATH= HF_HUB_OFFLINE=1
"$folder/venv/bin/python" -c 'import lit_bilevel; print(lit_bilevel.__file__)'
"$folder/venv/bin/lit-bilevel" --version
"$folder/venv/bin/lit-bilevel" fit --config configs/quickstart.yaml --trainer.max_steps 2 --trainer.default_root_dir run
"$folder/venv/bin/lit-bilevel" select --weights run/weights.parquet --pool lit_bilevel/toy/pool.jsonl --keep 0.5 --output kept.jsonl
