"""Bugs to plant in a run that resumes: each would train on, and end with other numbers or another record.

A process that finds one's name in MEGAGPT_TEST_BREAK plants it when it starts: see `planting`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training import ROOT


def position_off_by_one() -> None:
    """The first sample of the resumed run is the second one."""
    from megagpt.training import loop

    def build_run(*arguments: Any, real: Callable[..., Any] = loop.build_run) -> Any:
        run, state = real(*arguments)
        return run, replace(state, position=state.position + 1)

    loop.build_run = build_run


def moments_not_restored() -> None:
    """Weights come back, the optimizer's averages begin anew."""
    from megagpt.training import loop

    def build_run(*arguments: Any, real: Callable[..., Any] = loop.build_run) -> Any:
        from megagpt.engine import init_deepspeed  # noqa: F401  # first, as in a real start
        from megagpt.engine.state.partitions import WEIGHT, _Flat

        def put(shares: _Flat, share: Any, kind: str, value: Any, real_put: Callable[..., None] = _Flat.put) -> None:
            if kind == WEIGHT:
                real_put(shares, share, kind, value)

        _Flat.put = put
        return real(*arguments)

    loop.build_run = build_run


def moments_not_restored_nor_verified() -> None:
    """The same, with the check that follows a load switched off."""
    moments_not_restored()
    from megagpt.training import loop

    def build_run(*arguments: Any, real: Callable[..., Any] = loop.build_run) -> Any:
        from megagpt.engine import init_deepspeed  # noqa: F401
        from megagpt.engine.state.portable import Portable

        Portable._verify = lambda *_: None
        return real(*arguments)

    loop.build_run = build_run


def metrics_not_truncated() -> None:
    """What was recorded after the resumed update stays."""
    from megagpt.training import metrics

    metrics._truncate = lambda path, _: (list(metrics.read(path.parent)), 0.0)


def nothing() -> None:
    """No bug: to show that planting as such changes nothing."""


BREAKS = {
    plant.__name__: plant
    for plant in (
        position_off_by_one,
        moments_not_restored,
        moments_not_restored_nor_verified,
        metrics_not_truncated,
        nothing,
    )
}


def planting(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that are started from here on plant a bug; `folder` takes what Python imports at its start."""
    (folder / "sitecustomize.py").write_text(
        "import os\nfrom tests.faults.breaks import BREAKS\nBREAKS[os.environ['MEGAGPT_TEST_BREAK']]()\n"
    )
    monkeypatch.setenv("MEGAGPT_TEST_BREAK", name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]))
