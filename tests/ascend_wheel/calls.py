"""Finds every call of a torch_npu operator in source text and holds it against the schemas in the wheel."""

import ast
import re
from collections.abc import Iterator

import torch
import torch_npu  # noqa: F401

PREFIXES = ("torch_npu.", "torch.ops.npu.")


def operator_calls(source: str) -> Iterator[tuple[str, ast.Call]]:
    """(operator's name without prefix, call)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            written = ast.unparse(node.func)
            if not re.fullmatch(r"[\w.]+", written):  # a method of what a call gave
                continue
            for prefix in PREFIXES:
                if written.startswith(prefix):
                    yield written.removeprefix(prefix), node


def complaints(source: str) -> list[str]:
    """What is wrong with the calls in `source`; one line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        # another name would hide the calls from operator_calls
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch_npu":
            found.append(f"line {node.lineno}: write `import torch_npu`")
        if isinstance(node, ast.Import) and any(a.name.startswith("torch_npu") and a.asname for a in node.names):
            found.append(f"line {node.lineno}: write `import torch_npu`")
    for name, call in operator_calls(source):
        packet, _, overload = name.partition(".")
        library = next((each for each in (torch.ops.npu, torch.ops.atb) if hasattr(each, packet)), None)
        if library is None:
            found.append(f"line {call.lineno}: torch_npu has no operator {packet}")
            continue
        operator = getattr(library, packet)
        overloads = [overload] if overload else operator.overloads()
        reasons = [_mismatch(getattr(operator, each)._schema, call) for each in overloads]
        if all(reasons):
            found.append(f"line {call.lineno}: {packet}: {'; '.join(reasons)}")
    return found


def _mismatch(schema: torch.FunctionSchema, call: ast.Call) -> str | None:
    given = [keyword.arg for keyword in call.keywords]
    if None in given or any(isinstance(argument, ast.Starred) for argument in call.args):
        return "arguments must be written out to be checked"
    positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    if len(call.args) > len(positional):
        return f"takes {len(positional)} positional arguments, got {len(call.args)}"
    names = [argument.name for argument in schema.arguments]
    if unknown := [name for name in given if name not in names]:
        return f"has no argument {', '.join(unknown)}"
    taken = positional[: len(call.args)]
    if twice := [name for name in given if name in taken]:
        return f"gets {', '.join(twice)} twice"
    wanted = [argument.name for argument in schema.arguments if not argument.has_default_value()]
    if missing := [name for name in wanted if name not in (*taken, *given)]:
        return f"needs {', '.join(missing)}"
    return None
