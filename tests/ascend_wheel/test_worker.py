"""What is called on a worker inside vLLM is there in vllm-ascend's, which is no subclass of vLLM's own."""

import ast
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

# by what is installed and not by what is importable: other tests of this process put a module in its place
try:
    WHEEL = distribution("vllm-ascend")
except PackageNotFoundError:
    pytest.skip("vllm-ascend's wheel is not installed; launch/test.sh brings it", allow_module_level=True)

OURS = Path(__file__).parents[2] / "npd_ascend" / "rollout" / "vllm_versions.py"
THEIRS = Path(str(WHEEL.locate_file("vllm_ascend/worker/worker.py")))


def used(source: str) -> set[str]:
    """Of a worker: methods that collective_rpc calls by name, and what functions with an argument `worker` take."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "collective_rpc":
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "worker":
            names.add(node.attr)
    return names


def there() -> set[str]:
    """Methods of NPUWorker, and what its methods themselves find in self."""
    worker = next(n for n in ast.parse(THEIRS.read_text()).body if getattr(n, "name", "") == "NPUWorker")
    names = {node.name for node in worker.body if isinstance(node, ast.FunctionDef)}
    return names | {
        node.attr
        for node in ast.walk(worker)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }


def test_all_that_is_used_of_a_worker_is_there():
    assert {"model_runner", "device", "weight_transfer_engine"} <= used(OURS.read_text()) <= there()


def test_a_method_that_only_vllms_own_worker_has_is_seen():
    assert not used('llm.collective_rpc("reload_weights")') <= there()
    assert not used("def f(worker): worker.reload_weights()") <= there()
