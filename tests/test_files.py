"""Files that are replaced as a whole."""

import os

import pytest

from lit_bilevel.files import replace_text, replacing


def test_a_file_is_never_half_written(tmp_path):
    path = tmp_path / "new" / "file.txt"
    replace_text(path, "old")
    os.link(path, tmp_path / "reader")  # whoever has opened the old file keeps it
    replace_text(path, "new \ud800")
    assert path.read_text() == "new ?"
    assert (tmp_path / "reader").read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file.txt"
    replace_text(path, "old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]
