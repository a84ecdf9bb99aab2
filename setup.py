"""Puts `configs/` into a wheel, as `lit_bilevel/configs`; all else is said in pyproject.toml.

In the repository the recipes stay where they are, for an editable installation finds them there. There is no link from
one place to the other: zip files and Windows do not keep it.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Copies the recipes beside the modules."""

    def run(self):
        super().run()
        if not self.editable_mode:
            here = Path(__file__).parent / "configs"
            shutil.copytree(here, Path(self.build_lib) / "lit_bilevel" / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
