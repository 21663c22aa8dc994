"""The command line as its tests call it: in this process, in the folder of models that each file of tests makes."""

from __future__ import annotations

import json

import pytest
import torch
from edlm.cli import main


@pytest.fixture(scope="module")
def one_thread():
    """Last bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture
def document(edlm):
    """document("dit", ...) -> the JSON of one ``edlm eval``."""

    def run(*arguments):
        code, out, err = edlm("eval", *arguments, "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out)

    return run


@pytest.fixture
def refused(edlm):
    """refused("eval", "dit", ...) -> what is said of it: one line on stderr, code 2 and no output."""

    def run(*arguments):
        code, out, err = edlm(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("edlm: error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err

    return run
