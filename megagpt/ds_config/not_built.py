"""Layouts that megagpt does not run yet. The one place that says so."""

from __future__ import annotations

from collections.abc import Iterator

from megagpt.ds_config.view import View
from megagpt.errors import Problem

_DEGREES = {
    "pipeline.stages": "pipeline parallelism",
    "tensor_parallel.autotp_size": "tensor parallelism",
    "sequence_parallel_size": "sequence parallelism",
}


def not_built(view: View) -> Iterator[Problem]:
    """A problem for each layout that the config asks for and that is not there yet."""
    for key, name in _DEGREES.items():
        if view.number(key, 1) > 1:
            do = "take it away; zero1.json, zero2.json and zero3.json in ds_configs spread a model without it"
            yield view.problem(f"{name} is not built yet", [key], do)
