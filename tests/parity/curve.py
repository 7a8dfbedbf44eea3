"""Stores curves on disk, to pass them from the ranks to the tests."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from megagpt.parity.curve import Curve


def save(curve: Curve, path: Path) -> None:
    """Write a curve to path.initial, path.weights and, last, path.json."""
    save_file(curve.initial, f"{path}.initial")
    save_file(curve.weights, f"{path}.weights")
    numbers = {key: value for key, value in vars(curve).items() if key not in ("initial", "weights")}
    Path(f"{path}.json").write_text(json.dumps(numbers))


def load(path: Path) -> Curve:
    """Read a curve that `save` wrote."""
    numbers = json.loads(Path(f"{path}.json").read_text())
    return Curve(**numbers, initial=load_file(f"{path}.initial"), weights=load_file(f"{path}.weights"))
