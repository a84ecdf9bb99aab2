#!/usr/bin/env bash
# Install and run every check: lint, types, tests. Arguments go to pytest (for example: -m slow).
source "$(dirname "$0")/setup.sh" dev
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest -q "$@"
