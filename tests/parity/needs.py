"""What some layouts need of the machine. A case that cannot run here is skipped with the reason."""

from __future__ import annotations

import os
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
from layouts import Case
from torch.utils.cpp_extension import get_default_build_root


def missing(case: Case, build: bool) -> str | None:
    """Why the case cannot run, or None. With `build`, DeepSpeed's operators are compiled for it: minutes."""
    if "precision=fp16" in case.recipe and not get_accelerator().is_fp16_supported():
        return f"this {get_accelerator().device_name()} has no fp16"
    if '"nvme"' in str(case.config).replace("'", '"') and not _built("async_io"):
        if not build:
            return "DeepSpeed's async_io is not built here; --full builds it"
        if not AsyncIOBuilder().is_compatible():
            return "DeepSpeed's async_io cannot be built here: it needs libaio's headers"
        AsyncIOBuilder().load(verbose=False)
    return None


def _built(operator: str) -> bool:
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    return any(root.glob(f"**/{operator}/{operator}.so"))
