"""Finds every call of a torch_npu operator in source text and holds it against the schemas in the wheel."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch_npu  # noqa: F401
import yaml

PREFIXES = ("torch_npu.", "torch.ops.npu.")
Schemas = Callable[[str], list[torch.FunctionSchema]]  # of an operator by its name; none if there is no such operator


def compiled(operator: str) -> list[torch.FunctionSchema]:
    """Of the torch_npu that is loaded."""
    packets = [getattr(library, operator) for library in (torch.ops.npu, torch.ops.atb) if hasattr(library, operator)]
    return [getattr(packet, name)._schema for packet in packets[:1] for name in packet.overloads()]


def listed(package: Path) -> Schemas:
    """Of another version of torch_npu, from the files in its folder: the list of its operators, and those of nnal."""
    text = (package / "csrc" / "aten" / "npu_native_functions_by_codegen.yaml").read_text()
    entries = [entry for part in yaml.safe_load(text).values() if isinstance(part, list) for entry in part]
    lines = [entry["func"] for entry in entries if isinstance(entry, dict)]
    (library,) = package.glob("lib/libop_plugin_atb.so")
    lines += [line.decode() for line in re.findall(rb"\0(_?npu_[ -~]+\([ -~]+\) -> [ -~]+)\0", library.read_bytes())]
    return lambda operator: [
        torch._C.parse_schema(line) for line in lines if line.startswith((f"{operator}(", f"{operator}."))
    ]


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


def complaints(source: str, schemas_of: Schemas = compiled) -> list[str]:
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
        schemas = schemas_of(packet)
        if not schemas:
            found.append(f"line {call.lineno}: torch_npu has no operator {packet}")
            continue
        reasons = [_mismatch(each, call) for each in schemas if overload in ("", each.overload_name or "default")]
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
