#!/usr/bin/env bash
# Install and run every check: lint, types, tests. Arguments go to pytest (for example: -m slow).
source "$(dirname "$0")/setup.sh" dev
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
# Two processes, and each file in one of them (its runs are shared); one thread each, for the models are tiny.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$VENV/bin/python" -m pytest -q --numprocesses="${TEST_PROCESSES:-2}" --dist=loadfile "$@"
