"""Rotary position embedding, which provides cosine and sine of the angles for rotating queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryEmbedding:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) in Llama's rotate-half form.

    This class is not a module, because its tables are not state. They are created on first use on each device, so that
    neither a cast to bf16 nor the meta device affects them.
    """

    def __init__(self, head_dim: int, seq_len: int, theta: float) -> None:
        self.head_dim = head_dim
        self.seq_len = seq_len
        self.theta = theta
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def contiguous(self, start: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of the positions from `start` on, each an fp32 tensor [tokens, 1, head_dim / 2]."""
        cosine, sine = self._on(device)
        return cosine[start : start + tokens], sine[start : start + tokens]

    def at(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of position_ids [B, T], each an fp32 tensor [B, T, 1, head_dim / 2]."""
        cosine, sine = self._on(position_ids.device)
        return cosine[position_ids], sine[position_ids]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the cosine and sine of all positions on a device, each [seq_len, 1, head_dim / 2]."""
        if device not in self._tables:
            with torch.inference_mode(False):  # tables that are created during evaluation must also work in training
                exponents = torch.arange(0, self.head_dim, 2, device=device).float() / self.head_dim
                positions = torch.arange(self.seq_len, device=device).float()
                angles = torch.outer(positions, 1.0 / self.theta**exponents).unsqueeze(1)
                self._tables[device] = (angles.cos(), angles.sin())
        return self._tables[device]
