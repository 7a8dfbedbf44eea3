"""What a run did, as far as parity compares it: filled by the reference and by every layout. On disk and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True)
class Curve:
    """Per update: loss, gradient norm before clipping, learning rate, valid tokens. Before and after training: the
    loss on held-out samples, and all weights in fp32 by name.
    """

    losses: list[float]
    norms: list[float]
    rates: list[float]
    tokens: list[int]
    held_out: list[float]
    initial: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Write path.initial, path.weights and, last, path.json."""
        save_file(self.initial, f"{path}.initial")
        save_file(self.weights, f"{path}.weights")
        numbers = {key: value for key, value in vars(self).items() if key not in ("initial", "weights")}
        Path(f"{path}.json").write_text(json.dumps(numbers))

    @classmethod
    def load(cls, path: Path) -> Curve:
        """Read what `save` wrote."""
        numbers = json.loads(Path(f"{path}.json").read_text())
        return cls(**numbers, initial=load_file(f"{path}.initial"), weights=load_file(f"{path}.weights"))
