"""Layouts that megagpt does not run yet. The one place that says so."""

from __future__ import annotations

from collections.abc import Iterator

from megagpt.ds_config.view import View
from megagpt.errors import Problem


def not_built(view: View) -> Iterator[Problem]:
    """A problem for each layout that the config asks for and that is not there yet."""
    if view.get("activation_checkpointing"):
        what = "recomputation is not built yet, so activation_checkpointing would be ignored"
        yield view.problem(what, ["activation_checkpointing"], "take it away; a smaller micro-batch saves memory too")
