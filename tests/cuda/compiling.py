"""Compile a Triton kernel for an NVIDIA GPU on a machine without one: Triton brings ptxas along."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Compiled:
    shared_bytes: int  # per program
    registers: int  # per thread
    spilled_bytes: int  # per thread, stores to local memory


def compile_for(kernel, signature: dict[str, str], constants: dict, options: dict, capability: int) -> Compiled:
    """signature: argument -> Triton type, such as *bf16 or i32; constants: the tl.constexpr arguments."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # what a launch finds in torch's pointers
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature.get(n, "").startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(ptx), "-o", "/dev/null"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return Compiled(
        shared_bytes=compiled.metadata.shared,
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled_bytes=int(re.search(r"(\d+) bytes spill stores", said)[1]),
    )
