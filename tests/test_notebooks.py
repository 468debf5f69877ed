"""Every notebook's cheap cells run from top to bottom, examples and asserts included."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_cheap_cells_run(path, monkeypatch, capsys):
    from nbdev.test import test_nb

    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("MPLBACKEND", "agg")
    ok, seconds = test_nb(path, skip_flags=["notest", "gpu", "net"], basepath=path.parent.parent)
    assert ok, capsys.readouterr().out[-3000:]
