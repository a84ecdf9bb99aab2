"""Every configuration in the repository parses and builds its parts."""

from __future__ import annotations

import pytest
from conftest import ROOT

from lit_bilevel.cli import BilevelCLI

COMPLETE = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
PARTIAL = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_configurations_build(name, tmp_path):
    cli = BilevelCLI(
        [f"--config=configs/{name}", f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"],
        run=False,
    )
    assert cli.model.solver


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_configurations_parse_on_top_of_a_complete_one(name):
    with pytest.raises(SystemExit) as end:
        BilevelCLI(["--config=configs/quickstart.yaml", f"--config={name}", "--print_config"], run=False)
    assert end.value.code == 0
