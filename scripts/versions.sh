#!/usr/bin/env bash
# The ends of the ranges in pyproject.toml, each in an environment of its own: installs, runs the core of the tests, and
# adds a line to a table. An environment is removed when it has passed.
#
#   scripts/versions.sh [oldest] [pinned] [newest] [REQUIREMENTS …]     for example: scripts/versions.sh "torch==2.14.1 transformers==5.24.0"
#
# PYTHON chooses the interpreter, VENVS the folder of the environments, RESULTS the table, TESTS what is run (arguments of
# pytest). Every version of torch is a download of its own: some gigabytes, unless pip is offered a CPU build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} venvs=${VENVS:-$(mktemp -d)} results=${RESULTS:-versions.csv}
read -rd "" -a tests <<< "${TESTS:-tests/test_losses.py tests/test_solvers.py tests/test_optim.py tests/test_weights.py
    tests/test_weight_steps.py tests/test_weight_priors.py tests/test_policy_problem.py tests/test_policy_passes.py
    tests/test_generate.py tests/test_packing.py tests/test_data.py tests/test_stream.py
    tests/test_fit.py tests/test_training.py tests/test_configs.py}" || true  # the list has several lines, and `read` fails at the end of it
[ -s "$results" ] || echo "date,which,python,torch,lightning,transformers,peft,datasets,numpy,pyarrow,outcome" > "$results"

oldest() { # the lower end of every range, as pip takes constraints
    sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z0-9_-]*\)[^>"]*>=\([0-9.]*\).*/\1==\2/p' pyproject.toml
}

(($#)) || set -- oldest pinned newest
for which in "$@"; do
    venv="$venvs/${which//[^A-Za-z0-9.=]/_}"
    pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    constraints=$(mktemp) more=()
    case $which in
    oldest) oldest > "$constraints" ;;
    pinned) cp constraints.txt "$constraints" ;;
    newest) more=(--upgrade --upgrade-strategy eager) ;;
    *) tr ' ' '\n' <<< "$which" > "$constraints" ;;
    esac
    echo "== $which: installing into $venv ..."
    "${pip[@]}" install "${more[@]}" --constraint "$constraints" --editable ".[figures,test]"
    versions=$("$venv/bin/python" - <<< 'if True:
        import platform
        from importlib.metadata import version
        names = ("torch", "lightning", "transformers", "peft", "datasets", "numpy", "pyarrow")
        print(",".join([platform.python_version(), *map(version, names)]))')
    outcome=$("$venv/bin/python" -m pytest -q "${tests[@]}" 2>&1 | tee "$venv/tests.log" | tail -1) || true
    echo "$(date -I),${which//,/;},$versions,\"$outcome\"" | tee -a "$results"
    if grep -qE '(failed|error)' <<< "$outcome"; then
        tail -40 "$venv/tests.log"
    else
        rm -r "$venv"
    fi
done
