"""How a model may be cut over ranks: pipeline stages, tensor parts, sequence parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.ds_config.view import ConfigView
from megagpt.errors import Problem
from megagpt.recipe import Recipe
from megagpt.recipe.wording import TableRow, join_words

PIPELINE_STAGES_KEY, TENSOR_PARALLEL_KEY, SEQUENCE_PARALLEL_KEY = (
    "pipeline.stages",
    "tensor_parallel.autotp_size",
    "sequence_parallel_size",
)


@dataclass(frozen=True)
class ParallelDegrees:
    """Into how many parts each copy of the model is cut, three ways; 1 for not at all."""

    stages: int
    tensor: int
    sequence: int

    @property
    def ranks(self) -> int:
        """The ranks of one copy of the model."""
        return self.stages * self.tensor * self.sequence


NOT_PARALLEL = ParallelDegrees(1, 1, 1)


def parallel_degrees(view: ConfigView) -> ParallelDegrees:
    """The degrees that a config states."""
    tensor = max(view.explicit(TENSOR_PARALLEL_KEY, 1), 1)  # DeepSpeed's 0 is "off"
    return ParallelDegrees(view.explicit(PIPELINE_STAGES_KEY, 1), tensor, view.explicit(SEQUENCE_PARALLEL_KEY, 1))


def parallel_problems(view: ConfigView, recipe: Recipe, cut: ParallelDegrees) -> Iterator[Problem]:
    """Every way in which the model cannot be cut so."""
    model = recipe.model
    if cut.stages > model.n_layer:
        what = "the pipeline has more stages than the model has blocks"
        do = f"set {PIPELINE_STAGES_KEY} to at most {model.n_layer}"
        yield view.problem(what, [PIPELINE_STAGES_KEY], do, defaults=[_row(recipe, "n_layer")])
    stage = view.explicit("zero_optimization.stage", 0)
    if cut.stages > 1 and stage > 1:
        what = f"a pipeline cannot run at ZeRO stage {stage}: its gradients must stay whole between micro-batches"
        do = f"set zero_optimization.stage to 1, or take pipeline away and keep ZeRO stage {stage}"
        yield view.problem(what, ["zero_optimization.stage", PIPELINE_STAGES_KEY], do)
    if model.n_kv_head % (cut.tensor * cut.sequence):
        keys = [
            key
            for key, degree in ((TENSOR_PARALLEL_KEY, cut.tensor), (SEQUENCE_PARALLEL_KEY, cut.sequence))
            if degree > 1
        ]
        what = "the key and value heads cannot be shared evenly by the ranks that cut attention"
        do = f"set {' times '.join(keys)} to {_divisors(model.n_kv_head)}"
        yield view.problem(what, keys, do, defaults=[_row(recipe, "n_kv_head")])
    for key, degree, name in (
        (TENSOR_PARALLEL_KEY, cut.tensor, "d_ff"),
        (SEQUENCE_PARALLEL_KEY, cut.sequence, "seq_len"),
    ):
        size = getattr(model, name)
        if size % degree:
            what = f"model.{name} does not divide by {key}"
            do = f"set model.{name} to a multiple of {degree}"
            yield view.problem(what, [key], do, defaults=[_row(recipe, name)])
    yield from _ignored(view)


def _ignored(view: ConfigView) -> Iterator[Problem]:
    """Keys of DeepSpeed's AutoTP, in whose place megagpt cuts its own layers."""
    section = view.get("tensor_parallel", {})
    for name in section if isinstance(section, dict) else ():
        if name != "autotp_size" and view.is_valid(f"tensor_parallel.{name}"):
            what = f"tensor_parallel.{name} would be ignored: megagpt knows how its layers are cut"
            yield view.problem(what, [f"tensor_parallel.{name}"], "take it away; autotp_size is all that is needed")


def _row(recipe: Recipe, name: str) -> TableRow:
    key = f"model.{name}"
    return key, getattr(recipe.model, name), recipe.location(key) or recipe.location("model.preset") or "default"


def _divisors(number: int) -> str:
    return join_words(str(count) for count in range(1, number + 1) if number % count == 0)
