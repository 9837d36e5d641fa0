"""torch_npu from its wheel without CANN: libraries that stand in for it are compiled and loaded first.

The loader takes a library that is already there for every later wish for its name, so no LD_LIBRARY_PATH is needed.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# torch would import torch_npu itself, before the libraries are there
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
# set by launch/env_ascend.sh; the stub has no memory that grows, and torch_npu reads them when it is imported
for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
    os.environ.pop(name, None)
SOURCES = [str(Path(__file__).with_name(name)) for name in ("stub_cann.c", "stub_hccl.c")]
# torch_npu looks functions up library by library, so each of them has all
LIBRARIES = ["libascendcl", "libacl_op_compiler", "libhccl", "libge_runner", "libgraph", "libacl_tdt_channel", "libatb"]


def load_stub(*flags: str) -> None:
    """Before anything imports torch_npu. `flags`: of the compiler, see stub_cann.c."""
    if shutil.which("gcc") is None:
        raise SystemExit("tests/ascend_wheel compiles stub_*.c and finds no gcc; install it")
    with tempfile.TemporaryDirectory() as folder:
        for name in LIBRARIES:
            library = f"{folder}/{name}.so"
            named = [f"-Wl,-soname,{name}.so", "-o", library]
            subprocess.run(["gcc", "-shared", "-fPIC", "-w", *flags, *named, *SOURCES], check=True)
            ctypes.CDLL(library)


def open_wheel() -> None:
    """torch_npu as if there were eight NPUs, the first of them taken."""
    load_stub()
    import torch
    import torch_npu  # noqa: F401

    torch.npu.set_device(0)
