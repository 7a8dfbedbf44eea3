"""Bugs planted in a run that resumes, which then trains on but ends with other numbers or another record.

A process plants the bug that the environment variable MEGAGPT_TEST_BREAK names when it starts, see `planting`.
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
    """The weights are restored, but the moments of the optimizer start from zero."""
    from megagpt.training import loop

    def build_run(*arguments: Any, real: Callable[..., Any] = loop.build_run) -> Any:
        from megagpt.engine import init_deepspeed  # noqa: F401  # first, as in a real start
        from megagpt.engine.state.partitions import WEIGHT, _FlatPartitions

        def put(
            partitions: _FlatPartitions,
            partition: Any,
            kind: str,
            value: Any,
            real_put: Callable[..., None] = _FlatPartitions.put,
        ) -> None:
            if kind == WEIGHT:
                real_put(partitions, partition, kind, value)

        _FlatPartitions.put = put
        return real(*arguments)

    loop.build_run = build_run


def moments_not_restored_nor_verified() -> None:
    """The same, without the check that follows a load."""
    moments_not_restored()
    from megagpt.training import loop

    def build_run(*arguments: Any, real: Callable[..., Any] = loop.build_run) -> Any:
        from megagpt.engine import init_deepspeed  # noqa: F401
        from megagpt.engine.state.portable import PortableState

        PortableState._verify = lambda *_: None
        return real(*arguments)

    loop.build_run = build_run


def metrics_not_truncated() -> None:
    """Records after the resumed update are kept."""
    from megagpt.training import metrics

    metrics._truncate = lambda path, _: (list(metrics.read(path.parent)), 0.0)


def nothing() -> None:
    """No bug, to test that planting itself changes nothing."""


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
    """Make processes that are started from now on plant a bug.

    Args:
        name: Key of BREAKS.
        folder: Folder for a `sitecustomize.py`, which Python imports when it starts.
        monkeypatch: Sets the environment variables.
    """
    (folder / "sitecustomize.py").write_text(
        "import os\nfrom tests.faults.breaks import BREAKS\nBREAKS[os.environ['MEGAGPT_TEST_BREAK']]()\n"
    )
    monkeypatch.setenv("MEGAGPT_TEST_BREAK", name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]))
