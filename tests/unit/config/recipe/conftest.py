from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megagpt.config.recipe import Recipe, load

GOOD = """\
run_dir: runs/a
precision: bf16
model: {preset: gpt2-124m}
data: {train: data/x.train, validation: data/x.validation}
batch: {global_size: 64}
optimizer: {lr: 6.0e-4}
schedule: {warmup_updates: 10}
length: {updates: 100}
"""

Loader = Callable[..., Recipe]


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Return a function that loads the recipe GOOD with some lines replaced (by number) and some added."""
    monkeypatch.chdir(tmp_path)

    def load_edited(lines: dict[int, str] | None = None, *overrides: str, add: str = "") -> Recipe:
        text = GOOD.splitlines()
        for number, line in (lines or {}).items():
            text[number - 1] = line
        Path("r.yaml").write_text("\n".join(text) + "\n" + add, encoding="utf-8")
        return load("r.yaml", overrides)

    return load_edited
