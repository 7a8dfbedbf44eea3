from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megagpt.config.deepspeed import Resolved, load
from megagpt.config.recipe import load as load_recipe
from megagpt.errors import UserError

RECIPE = """\
run_dir: runs/a
model: {preset: gpt2-124m}
precision: fp32
data: {train: data/x.train}
batch: {global_size: 64}
optimizer: {lr: 6.0e-4}
schedule: {warmup_updates: 10}
length: {updates: 100}
"""

Resolver = Callable[..., Resolved]


@pytest.fixture(scope="session")
def known() -> dict[str, Any]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from megagpt.engine.deepspeed_keys import known_keys

    return known_keys()


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: dict[str, Any]) -> Resolver:
    """Return a function that resolves a config of the given lines with RECIPE on a number of ranks."""
    monkeypatch.chdir(tmp_path)

    def resolve_lines(*lines: str, ranks: int = 2, overrides: tuple[str, ...] = ()) -> Resolved:
        Path("r.yaml").write_text(RECIPE, encoding="utf-8")
        Path("d.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return load("d.json", load_recipe("r.yaml", overrides), ranks, known, overrides)

    return resolve_lines


@pytest.fixture
def expect_error(resolve: Resolver) -> Callable[..., None]:
    """Return a function that asserts that resolving some lines fails with exactly this message."""

    def compare(lines: list[str], message: str, **how: Any) -> None:
        with pytest.raises(UserError) as caught:
            resolve(*lines, **how)
        assert str(caught.value) == message

    return compare
