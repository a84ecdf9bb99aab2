"""The README's own code runs, and its commands name things that exist."""

from __future__ import annotations

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    namespace: dict = {}
    exec(compile(code, "README.md", "exec"), namespace)
    weights = namespace["weights"]
    assert len(weights) == 4000
    assert abs(float(weights.mean()) - 1) < 1e-9
    assert float(weights.std()) > 0


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"(?:\./)?((?:scripts|configs|lit_bilevel)/[\w/.]+\.(?:sh|py|yaml))", README):
        assert (ROOT / path).exists(), path
