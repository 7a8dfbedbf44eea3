"""Training engines on top of DeepSpeed. Only this package imports DeepSpeed."""

import os

# DeepSpeed's ZeRO imports DeepSpeed's Muon, whose @torch.compile imports all of inductor. That costs seconds at startup
# for code that is not used here. torch.compile is disabled during this import only, because document masks on GPUs use
# it (model/document_mask.py).
_WAS_SET = "TORCHDYNAMO_DISABLE" in os.environ
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import deepspeed  # noqa: E402, F401

if not _WAS_SET:
    del os.environ["TORCHDYNAMO_DISABLE"]
