"""The scripts that made the figures of the documents still fit the code that they call."""

import importlib.util
import sys

import pytest
from conftest import CONFIGS

FOLDER = CONFIGS.parent / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_finds_all_that_it_imports(script, monkeypatch):
    """TRL, which one of them starts in an environment of its own, is in benchmarks/on_policy."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location(f"benchmark_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.__doc__
