"""The command line as its tests call it: in this process, in the folder of models that each file of tests makes."""

from __future__ import annotations

import pytest
from edlm.cli import main


@pytest.fixture
def edlm(folder, capsys, monkeypatch):
    """edlm("sample", "dit", ...) -> (code, stdout, stderr), in the folder of the models."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
