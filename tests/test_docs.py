"""Commands, keys and files that the documents name exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from npd_ascend.arguments import parser
from npd_ascend.config import Config
from npd_ascend.config_file import known_keys

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
        assert leaf in known_keys([section], Config), key


_VARIABLE = re.compile(
    r"\b(?:ASCEND|ATB|CPU_AFFINITY|GLOO|HCCL|LOCAL_RANK|PYTORCH|TASK_QUEUE|TORCH_DEVICE|VLLM)[A-Z_]*\b"
)
_CALLS = {"LLM", "SamplingParams"}


def test_every_variable_and_argument_of_the_npu_path_has_its_source():
    """In docs/ascend.md: what torch_npu, CANN, HCCL and vLLM read, and what vLLM is called with."""
    text = (ROOT / "docs" / "ascend.md").read_text()
    sources = [path for root in ("npd_ascend", "kernels") for path in sorted((ROOT / root).rglob("*.py"))]
    used = {name for path in sources for name in _strings(path) if _VARIABLE.fullmatch(name)}
    for path in sorted((ROOT / "launch").glob("*.sh")):
        used |= set(_VARIABLE.findall(path.read_text()))
    assert {"HCCL_BUFFSIZE", "VLLM_HOST_IP", "LOCAL_RANK"} <= used
    given = {name for path in sources for name in _arguments(path)}
    assert {"kv_cache_memory_bytes", "allowed_token_ids"} <= given
    assert sorted(name for name in used | given if not re.search(rf"\b{name}\b", text)) == []


# where theirs are imported, and how they are called here: torch_npu itself, vLLM's LLM and a worker of it
_PACKAGES, _ROOTS = {"torch_npu", "vllm", "vllm_ascend"}, {"torch_npu", "llm", "worker"}
# theirs, behind what is called here; a position of LLM.enqueue
_BEHIND = {"_fused_adamw_", "random_sample", "sampling_params"}


def test_every_call_of_torch_npu_and_vllm_has_its_source():
    text = (ROOT / "docs" / "ascend.md").read_text()
    sources = [path for root in ("npd_ascend", "kernels") for path in sorted((ROOT / root).rglob("*.py"))]
    used = {name for path in sources for name in _called(path)}
    assert {"npu_swiglu", "WeightTransferEngine", "reload_weights", "PyHcclCommunicator"} <= used
    assert sorted(name for name in used if not re.search(rf"\b{name}\b", text)) == []


def test_every_call_with_a_source_is_made_where_it_says():
    table = (ROOT / "docs" / "ascend.md").read_text().split("## Operators and interfaces")[1].split("\n## ")[0]
    code, names = "", set()
    for row in [row for row in table.splitlines() if row.startswith("| ")][1:]:
        name, where, _ = row.split(" | ")
        if where != "the same":
            code = "".join((ROOT / path).read_text() for path in re.findall(r"`([\w/]+\.py)`", where))
        named = {word for quoted in re.findall(r"`(.+?)`", name) for word in re.findall(r"[A-Za-z_]\w+", quoted)}
        assert sorted(word for word in named - _BEHIND if not re.search(rf"\b{word}\b", code)) == [], row
        names |= named
    assert len(names) > 80


def _called(path: Path) -> list[str]:
    """What is imported from _PACKAGES, and every attribute on the way from one of _ROOTS."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _PACKAGES:
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in _ROOTS:
            names.append(node.attr)
    return names


def _strings(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def _arguments(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", None) in _CALLS]
    return [keyword.arg for call in calls for keyword in call.keywords]
