"""Documents in one sequence: attention stays within each of them, and token positions restart at its first token.

Without it a token sees what happens to lie before its document (the case for it: arXiv 2404.10830, section 4).
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils._triton import has_triton

log = logging.getLogger(__name__)


class Bounds(NamedTuple):
    """The documents of one batch, as the layers need them.

    `places` [B, T] counts each token from the first of its document. `mask` says which keys a query sees, itself and
    earlier ones of its document: [B, 1, S, S] with True for a key that is seen, or a BlockMask on GPUs. S is T, or the
    whole sequence where T is one rank's part of it.
    """

    places: Tensor
    mask: Tensor | BlockMask


class Documents:
    """What all layers of a model know of the batch at hand: `now`. No module, for it holds no weights.

    A document ends with the token `end`, which is its last one. With `in_blocks` a GPU skips what no query sees. Where
    sequences are cut over ranks, `first` is the place of the first token here, and `whole` joins the ranks' ids [B, T]
    to [B, S].
    """

    def __init__(self, end: int, in_blocks: bool = True) -> None:
        self.end, self.in_blocks, self.first = end, in_blocks, 0
        self.now: Bounds | None = None

    def whole(self, input_ids: Tensor) -> Tensor:
        """The ids of whole sequences."""
        return input_ids

    def see(self, input_ids: Tensor) -> None:
        """Find the documents in the input_ids [B, T] that the layers are about to be given."""
        ends = self.whole(input_ids) == self.end
        number = ends.cumsum(1) - ends.long()
        at = torch.arange(ends.shape[1], device=ends.device)
        begins = F.pad(ends[:, :-1], (1, 0), value=True)
        places = at - torch.where(begins, at, 0).cummax(1).values
        mine = slice(self.first, self.first + input_ids.shape[1])
        in_blocks = self.in_blocks and ends.is_cuda and _compiles()
        self.now = Bounds(places[:, mine], (_blocks if in_blocks else _pairs)(number))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attention from q [B, H, T, h], k and v [B, K, T, h] to [B, H, T, h] that skips blocks without a seen key."""
    run = _compiled(flex_attention) if q.is_cuda else flex_attention
    mixed: Tensor = run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return mixed


def _pairs(number: Tensor) -> Tensor:
    """The mask of documents numbered [B, T], pair by pair."""
    return (number.unsqueeze(2) == number.unsqueeze(1)).tril().unsqueeze(1)


def _blocks(number: Tensor) -> BlockMask:
    """The same mask, as the blocks that a GPU need not compute."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (number[batch, query] == number[batch, key])

    rows, tokens = number.shape
    create: Any = _compiled(create_block_mask) if number.is_cuda else create_block_mask
    blocks: BlockMask = create(seen, rows, None, tokens, tokens, device=str(number.device))
    return blocks


@cache
def _compiled(function: Any) -> Any:
    """One fused kernel per shape; without compilation all scores, or all pairs, would be held at once."""
    os.environ.pop(
        "TORCHDYNAMO_DISABLE", None
    )  # engine/init_deepspeed.py has it for a quick start; torch looks at it here
    return torch.compile(function, dynamic=False)


@cache
def _compiles() -> bool:
    """Whether kernels can be compiled here: Triton compiles a piece of C for each. Said once where they cannot."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "gcc", "clang") if name and (found := shutil.which(name))), None
    )
    header = Path(sysconfig.get_path("include"), "Python.h")
    able = bool(has_triton() and compiler and header.exists())
    if not able:
        log.warning("documents are masked pair by pair, slowly: block masks want Triton, a C compiler and %s", header)
    return able
