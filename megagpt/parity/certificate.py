"""The certificate of a layout, which lists what was compared, what was run on the real shape, and what is unproven."""

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
    """Result of one update of the real model on the real layout.

    Attributes:
        micro_batches: number of micro-batches per rank.
        loss: loss in nats per token.
        norm: gradient norm before clipping.
        made: False if the gradient was not finite, so the weights did not change.
        differences: comparison of loss and norm with those of one process; empty if one process did not compute them.
    """

    micro_batches: int
    loss: float
    norm: float
    made: bool
    differences: tuple[Difference, ...] = ()

    @property
    def passed(self) -> bool:
        """True if the update was made, and loss and norm are finite and match those of one process, if known."""
        finite = math.isfinite(self.loss) and math.isfinite(self.norm)
        return self.made and finite and not any(row.too_far for row in self.differences)

    def __str__(self) -> str:
        numbers = f"loss {self.loss:.9g}, gradient norm {self.norm:.9g}{'' if self.made else ', not made'}"
        differences = " and ".join(f"{row.kind} {row.off:.1e}" for row in self.differences)
        return f"{numbers}; relative difference to one process: {differences}" if differences else numbers


@dataclass(frozen=True)
class Certificate:
    """Results of all checks of a layout. `str` formats them for a terminal.

    Attributes:
        real: the real recipe and its DeepSpeed config.
        small: the shrunk recipe and its DeepSpeed config.
        updates: number of updates of the run with the shrunk model.
        stages: pipeline stages of the real model.
        differences: comparison of every number of the shrunk run with one process; empty before that run.
        update: result of one update of the real model; None if it was not made.
        obstacle: reason why no update of the real model was made; "" if it was made or not tried.
    """

    real: Resolved
    small: Resolved
    updates: int
    stages: list[real_shape.Stage]
    differences: Sequence[Difference] = ()
    update: RealUpdate | None = None
    obstacle: str = ""

    @property
    def stage_problems(self) -> list[str]:
        """Reasons why the stages of the real model do not fit together, one line each."""
        return real_shape.stage_problems(self.stages, self.real)

    @property
    def has_same_stages(self) -> bool:
        """True if both models have the same kinds of layer and the same parameter groups on each stage."""
        return real_shape.same_stages(self.stages, real_shape.build_stages(self.small))

    @property
    def passed(self) -> bool:
        """True if every check that was made succeeded."""
        wrong = self.stage_problems or any(row.too_far for row in self.differences)
        return not wrong and (self.update is None or self.update.passed)

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
            same = "the same" if self.has_same_stages else "DIFFERENT"
            kinds = real_shape.format_stage_kinds([stage.kinds for stage in self.stages])
            yield f"stages   {kinds}; {same} in the shrunk model"
        yield f"versions {versions}"

    def _numbers(self) -> Iterator[str]:
        if self.differences:
            for row in (worst(self.differences, kind) for kind in KINDS):
                yield f"{row.kind:9}largest relative difference {row.off:.1e}, allowed {row.limit:.0e}"
            yield ""

    def _real(self) -> Iterator[str]:
        if not self.stage_problems:
            groups = ", ".join(str(len(stage.groups)) for stage in self.stages)
            sent = f", {self.stages[0].output} from each stage to the next" if len(self.stages) > 1 else ""
            yield f"real shape: built on the meta device: parameter groups {groups}; even shards{sent}"
        if self.update is not None:
            size = f"{self.update.micro_batches} × {self.real.layout.micro_batch} samples"
            yield f"real shape: one update, {size} per rank: {self.update}"
        for line in self._not_proven():
            yield f"not proven: {line}"

    def _not_proven(self) -> Iterator[str]:
        """Yield a line about each property that this certificate does not prove."""
        if not self.differences:
            return
        if not self.has_same_stages:
            yield "the curve with these stages: no small model is split in the same way"
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
        if self.stage_problems:
            return [
                "THIS LAYOUT DOES NOT RUN: its stages do not fit together",
                *(f"  {row}" for row in self.stage_problems),
            ]
        if wrong:
            first = (f"  {row}" for row in wrong[:3])
            return [f"NOT THE SAME CURVE as one process: {len(wrong)} numbers differ, the first of them:", *first]
        if self.update is not None and not self.update.passed:
            rows = [f"  {row}" for row in self.update.differences if row.too_far] or [f"  {self.update}"]
            return ["NOT THE SAME UPDATE of the real shape as one process:", *rows]
        return ["the same curve as one process, update by update"]
