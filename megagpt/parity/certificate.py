"""The certificate of a layout: what was compared, what was tried on the real shape, and what was not proven."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from megagpt.config.deepspeed import Resolved
from megagpt.parity import real_shape
from megagpt.parity.curve import KINDS, Difference, worst


@dataclass(frozen=True)
class RealUpdate:
    """One update of the real model on the real layout."""

    micro_batches: int
    """per rank"""
    loss: float
    norm: float
    made: bool
    differences: tuple[Difference, ...] = ()
    """loss and norm compared with one process; empty if that was not computed"""

    @property
    def good(self) -> bool:
        """Whether the update was made, with finite numbers, and with those of one process if they are known."""
        finite = math.isfinite(self.loss) and math.isfinite(self.norm)
        return self.made and finite and not any(row.too_far for row in self.differences)

    def __str__(self) -> str:
        numbers = f"loss {self.loss:.9g}, gradient norm {self.norm:.9g}{'' if self.made else ', not made'}"
        off = " and ".join(f"{row.kind} by {row.off:.1e}" for row in self.differences)
        return f"{numbers}; off from one process: {off}" if off else numbers


@dataclass(frozen=True)
class Certificate:
    """All that was found about a layout; its text is what people read."""

    real: Resolved
    small: Resolved
    updates: int
    stages: list[real_shape.Stage]
    """of the real shape"""
    differences: Sequence[Difference] = ()
    """every number of the small run compared with one process; empty before the small run"""
    update: RealUpdate | None = None
    obstacle: str = ""
    """why no update of the real shape was made"""

    @property
    def faults(self) -> list[str]:
        """A line for each way in which the stages of the real shape do not fit together."""
        return real_shape.faults(self.stages, self.real)

    @property
    def cut_alike(self) -> bool:
        """Whether the shrunk model has the same layers and parameter groups on each stage as the real one."""
        return real_shape.alike(self.stages, real_shape.build_stages(self.small))

    @property
    def good(self) -> bool:
        """Whether nothing that was tried went wrong."""
        wrong = self.faults or any(row.too_far for row in self.differences)
        return not wrong and (self.update is None or self.update.good)

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._numbers(), *self._real(), "", *self._verdict()])

    def _head(self) -> Iterator[str]:
        layout, model = self.small.layout, self.small.recipe.model
        versions = ", ".join(f"{name} {version(name)}" for name in ("megagpt", "deepspeed", "torch"))
        yield f"parity   {layout}, {layout.batch_product} samples per update, {self.small.recipe.precision}"
        yield (
            f"model    the recipe's, shrunk to {model.n_layer} blocks of width {model.d_model} and a vocabulary of "
            f"{model.vocab_size:,}; {self.updates} updates"
        )
        if layout.pipeline_stages > 1:
            same = "the same" if self.cut_alike else "OTHERS"
            kinds = real_shape.described([stage.kinds for stage in self.stages])
            yield f"stages   {kinds}; {same} in the shrunk model"
        yield f"versions {versions}"

    def _numbers(self) -> Iterator[str]:
        if self.differences:
            for row in (worst(self.differences, kind) for kind in KINDS):
                yield f"{row.kind:9}largest relative difference {row.off:.1e}, allowed {row.limit:.0e}"
            yield ""

    def _real(self) -> Iterator[str]:
        if not self.faults:
            groups = ", ".join(str(len(stage.groups)) for stage in self.stages)
            sent = f", {self.stages[0].output} from each stage to the next" if len(self.stages) > 1 else ""
            yield f"real shape: built on the meta device: parameter groups {groups}; even shards{sent}"
        if self.update is not None:
            size = f"{self.update.micro_batches} × {self.real.layout.micro_batch} samples"
            yield f"real shape: one update, {size} per rank: {self.update}"
        for line in self._not_proven():
            yield f"not proven: {line}"

    def _not_proven(self) -> Iterator[str]:
        """What nobody should read into this certificate."""
        if not self.differences:
            return
        if not self.cut_alike:
            yield "the curve of these stages: no small model is cut alike"
        if self.obstacle:
            yield f"that an update of the real shape can be made: {self.obstacle}"
        elif self.update is not None and not self.update.differences:
            yield "the loss of the real shape: too much for one process, or random because of dropout"
        if self.update is not None and self.update.micro_batches < self.real.layout.accumulation:
            yield f"an update of all {self.real.layout.accumulation} micro-batches per rank"
        if self.real.recipe.model.dropout:
            yield "the curve with dropout, which is off in the shrunk model"
        yield "later updates of the real shape: curves and weights were compared on the shrunk model"

    def _verdict(self) -> list[str]:
        wrong = [row for row in self.differences if row.too_far]
        if self.faults:
            return ["THIS LAYOUT DOES NOT RUN: its stages do not fit together", *(f"  {row}" for row in self.faults)]
        if wrong:
            first = (f"  {row}" for row in wrong[:3])
            return [f"ANOTHER CURVE than one process; {len(wrong)} numbers differ, first:", *first]
        if self.update is not None and not self.update.good:
            rows = [f"  {row}" for row in self.update.differences if row.too_far] or [f"  {self.update}"]
            return ["ANOTHER UPDATE of the real shape than one process:", *rows]
        return ["the same curve as one process, update by update"]
