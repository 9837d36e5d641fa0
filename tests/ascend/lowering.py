"""Compile a Triton kernel for Ascend as far as it goes without CANN.

triton-ascend turns the kernel into linalg; bishengir-compile (package ascendnpu-ir) takes that through its whole
pipeline, the plan of on-chip memory included, and only then calls hivmc, which comes with CANN. So a kernel that fits
the chip fails at hivmc and nowhere else.
"""

import os
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from triton._C.libtriton import ir
from triton.backends.ascend import compiler as ascend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What triton-ascend itself passes.
_FLAGS = [
    "--enable-auto-multi-buffer=True",
    "--enable-auto-bind-sub-block=True",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
]


@dataclass(frozen=True)
class Lowered:
    fits: bool  # every step but hivmc went through
    said: str  # by the compiler


def lower(kernel, signature: dict[str, str], constants: dict, chip: str) -> Lowered:
    """signature: argument -> Triton type, such as *bf16 or i32; constants: the tl.constexpr arguments."""
    target = GPUTarget("npu", chip, 0)
    backend = ascend.AscendBackend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=kernel, signature=signature, constants=constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = dict(options.__dict__) | {"target": target}
    module = ascend.make_ttir(module, metadata, options)
    linalg, _ = ascend._parse_linalg_metadata(
        ascend.ttir_to_linalg(module, metadata, options, named_ops=True), metadata
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.mlir"
        file.write_text(linalg)
        compiler = _compiler()
        done = subprocess.run(
            [str(compiler), str(file), f"--target={chip}", *_FLAGS, "-o", str(Path(folder) / "kernel")],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PATH": f"{compiler.parent}:{os.environ['PATH']}"},
        )
    said = done.stdout + done.stderr
    return Lowered(fits="External hivmc run fails" in said, said=said)


def _compiler() -> Path:
    return Path(find_spec("ascendnpuir").submodule_search_locations[0]) / "bin" / "bishengir-compile"
