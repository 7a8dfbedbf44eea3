"""Document masking, which restricts attention to the tokens of one document and restarts positions at each document.

Without masking, a token also attends to unrelated documents that precede its own in the same sequence (see arXiv
2404.10830, section 4, for the effects).
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._triton import has_triton

log = logging.getLogger(__name__)


class DocumentMask:
    """Builder of position ids and attention masks from the token ids of whole sequences.

    Args:
        end: id of the token that ends a document. The token belongs to the document that it ends
        allow_blocks: whether to use a block mask on GPUs, with which attention skips blocks that are masked entirely

    """

    def __init__(self, end: int, allow_blocks: bool = True) -> None:
        self.end = end
        self.allow_blocks = allow_blocks

    def build(self, input_ids: Tensor) -> tuple[Tensor, Tensor | BlockMask]:
        """Build the position ids and the attention mask of input_ids [B, S].

        Returns:
            Position ids [B, S], counted from the first token of each document, and the attention mask. A token attends
            to itself and to earlier tokens of its document. The mask is a BlockMask if block masks can be used.
            Otherwise it is a tensor [B, 1, S, S] that is True if a query attends to a key.

        """
        ends = input_ids == self.end
        document_ids = ends.cumsum(1) - ends.long()
        indices = torch.arange(ends.shape[1], device=ends.device)
        is_first = F.pad(ends[:, :-1], (1, 0), value=True)
        position_ids = indices - torch.where(is_first, indices, 0).cummax(1).values
        if self.allow_blocks and ends.is_cuda and _can_compile():
            return position_ids, block_mask(document_ids)
        return position_ids, dense_mask(document_ids)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Return attention [B, H, T, h] of q [B, H, T, h], k [B, K, T, h] and v [B, K, T, h], skipping masked blocks."""
    run = _compiled(flex_attention) if q.is_cuda else flex_attention
    mixed: Tensor = run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed


def dense_mask(document_ids: Tensor) -> Tensor:
    """Return the attention mask [B, 1, S, S] of tokens in the documents document_ids [B, S]."""
    return (document_ids.unsqueeze(2) == document_ids.unsqueeze(1)).tril().unsqueeze(1)


def block_mask(document_ids: Tensor) -> BlockMask:
    """Return the same mask as `dense_mask` as a BlockMask, which lists the blocks that have to be computed."""

    def is_attended(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    rows, tokens = document_ids.shape
    create: Any = _compiled(create_block_mask) if document_ids.is_cuda else create_block_mask
    blocks: BlockMask = create(is_attended, rows, None, tokens, tokens, device=str(document_ids.device))
    return blocks


@cache
def _compiled(function: Any) -> Any:
    """Compile a function to one fused kernel per shape.

    Without compilation, flex attention would store all attention scores in memory at once.
    """
    return torch.compile(function, dynamic=False)


@cache
def _can_compile() -> bool:
    """Return whether kernels can be compiled on this host. Logs a warning, only once, if they cannot.

    Compilation requires Triton, a C compiler and the header files of Python.
    """
    compilers = (os.environ.get("CC"), "gcc", "clang")
    has_compiler = any(name and shutil.which(name) for name in compilers)
    header = Path(sysconfig.get_path("include"), "Python.h")
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        log.warning("document masks are dense, which is slow: TORCHDYNAMO_DISABLE=1 turns compiled block masks off")
        return False
    if has_triton() and has_compiler and header.exists():
        return True
    log.warning("document masks are dense, which is slow: block masks need Triton, a C compiler and %s", header)
    return False
