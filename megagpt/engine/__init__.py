"""The engine: everything that touches DeepSpeed."""

import os

# DeepSpeed's ZeRO imports its Muon, whose @torch.compile imports all of inductor: seconds of startup for code that is
# not used here. Only this import is without torch.compile; document masks on GPUs use it (model/document_mask.py).
_WAS_SET = "TORCHDYNAMO_DISABLE" in os.environ
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed  # noqa: E402, F401

if not _WAS_SET:
    del os.environ["TORCHDYNAMO_DISABLE"]
