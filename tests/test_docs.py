"""Commands, keys and files that the documents name exist."""

import re
import shlex
from pathlib import Path

import pytest

from npd_ascend.arguments import parser
from npd_ascend.config import Config, _known_keys

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_npd_command_parses(path):
    for block in re.findall(r"```(?:\w*)\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.splitlines():
            if re.match(r"npd [a-z]", line):  # not a row of a printed table
                parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_file_named_is_there(path):
    named = re.findall(r"`((?:npd_ascend|kernels|launch|configs|tests|benchmarks|docs)/[\w./-]+)`", path.read_text())
    named += [link for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()) if "://" not in link]
    for name in named:
        assert (ROOT / name).exists() or (path.parent / name).exists(), name


def test_every_key_named_in_the_method_exists():
    sections = set(Config.model_fields)
    text = (ROOT / "docs" / "method.md").read_text()
    named = [key for key in re.findall(r"`(\w+\.\w+)`", text) if key.split(".")[0] in sections]
    assert len(named) > 5
    for key in named:
        section, leaf = key.split(".")
        assert leaf in _known_keys([section]), key
