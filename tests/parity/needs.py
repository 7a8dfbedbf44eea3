"""Requirements of some layouts besides Python, and how a worker meets them."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.ops.op_builder.pin_memory import PinMemoryBuilder
from torch.utils.cpp_extension import get_default_build_root

from tests.parity.layouts import Case

_PARTS = ("aio", "pin_memory")  # folders of DeepSpeed's sources
_TWICE = ("c_library_name", "c_block_size", "c_io_queue_depth")  # static variables defined in several files


def provide(case: Case) -> None:
    """Prepare this process to build the engine of a case.

    If the processor does not support fp16, it is computed in software, with the same results. DeepSpeed's module for
    asynchronous I/O is compiled as one file instead of fifteen, which takes one minute instead of seven, because each
    file includes all of torch.
    """
    accelerator, wants_fp16 = get_accelerator(), "precision=fp16" in case.recipe
    native = type(accelerator).is_fp16_supported
    accelerator.is_fp16_supported = lambda: wants_fp16 or bool(native(accelerator))
    _compile_as_one_file()


def missing(case: Case) -> str | None:
    """Return why a case cannot run here, or None. Compiles what it needs, so that no rank has to wait for it."""
    return _without_async_io() if "nvme" in str(case.config) else None


@lru_cache
def _without_async_io() -> str | None:
    if not AsyncIOBuilder().is_compatible():
        return "layouts with NVMe: DeepSpeed's async_io needs a C++ compiler and libaio's headers (tests/install.sh)"
    _compile_as_one_file()
    AsyncIOBuilder().load(verbose=False)
    return None


@lru_cache
def _compile_as_one_file() -> None:
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "as_one_file"
    source = Path(AsyncIOBuilder().deepspeed_src_path("csrc"))
    for path in (path for part in _PARTS for path in (source / part).rglob("*.*")):
        once = "#pragma once\n" if path.suffix == ".h" else ""
        _write(folder / "csrc" / path.relative_to(source), once + path.read_text())
    for builder in (AsyncIOBuilder, PinMemoryBuilder):
        names, includes = builder().sources(), builder().include_paths()
        text = ""
        for number, name in enumerate(names):
            text += "".join(f"#define {twice} {twice}_{number}\n" for twice in _TWICE)
            text += f'#include "{name}"\n' + "".join(f"#undef {twice}\n" for twice in _TWICE)
        whole = folder / f"{builder.NAME}.cpp"
        _write(whole, text)
        builder.sources = lambda _, whole=whole: [str(whole)]
        builder.include_paths = lambda _, includes=includes: [str(folder / path) for path in includes]


def _write(path: Path, text: str) -> None:
    """Write a file unless it already has this content: a new modification time would cause it to be compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_text(text)
        new.replace(path)  # another process may be compiling it
