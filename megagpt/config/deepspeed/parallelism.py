"""Parallelism degrees, the numbers of pipeline stages, tensor-parallel parts and sequence-parallel parts of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.config.deepspeed.view import ConfigView
from megagpt.config.recipe import Recipe
from megagpt.config.syntax.formatting import TableRow, join_words
from megagpt.errors import Problem

PIPELINE_STAGES_KEY = "pipeline.stages"
TENSOR_PARALLEL_KEY = "tensor_parallel.autotp_size"
SEQUENCE_PARALLEL_KEY = "sequence_parallel_size"


@dataclass(frozen=True)
class ParallelDegrees:
    """Numbers of parts into which each replica of the model is split in each dimension; 1 means no split."""

    stages: int
    tensor: int
    sequence: int

    @property
    def ranks(self) -> int:
        """Number of ranks that together hold one replica of the model."""
        return self.stages * self.tensor * self.sequence


NOT_PARALLEL = ParallelDegrees(1, 1, 1)


def parallel_degrees(view: ConfigView) -> ParallelDegrees:
    """Return the parallelism degrees that a config sets."""
    tensor = max(view.explicit(TENSOR_PARALLEL_KEY, 1), 1)  # In DeepSpeed, 0 turns tensor parallelism off.
    return ParallelDegrees(view.explicit(PIPELINE_STAGES_KEY, 1), tensor, view.explicit(SEQUENCE_PARALLEL_KEY, 1))


def parallel_problems(view: ConfigView, recipe: Recipe, degrees: ParallelDegrees) -> Iterator[Problem]:
    """Yield every reason why the model cannot be split this way.

    Args:
        view: the DeepSpeed config.
        recipe: the recipe, which defines the shape of the model.
        degrees: the degrees that the config sets.
    """
    model = recipe.model
    if degrees.stages > model.n_layer:
        what = "the pipeline has more stages than the model has blocks"
        do = f"set {PIPELINE_STAGES_KEY} to at most {model.n_layer}"
        yield view.problem(what, [PIPELINE_STAGES_KEY], do, defaults=[_row(recipe, "n_layer")])
    zero_stage = view.explicit("zero_optimization.stage", 0)
    if degrees.stages > 1 and zero_stage > 1:
        what = f"a pipeline cannot run at ZeRO stage {zero_stage}, which partitions gradients between micro-batches"
        do = f"set zero_optimization.stage to 1, or remove pipeline and keep ZeRO stage {zero_stage}"
        yield view.problem(what, ["zero_optimization.stage", PIPELINE_STAGES_KEY], do)
    if model.n_kv_head % (degrees.tensor * degrees.sequence):
        splits = ((TENSOR_PARALLEL_KEY, degrees.tensor), (SEQUENCE_PARALLEL_KEY, degrees.sequence))
        keys = [key for key, degree in splits if degree > 1]
        what = "the key and value heads cannot be divided evenly among the ranks that split attention"
        do = f"set {' times '.join(keys)} to {_divisors(model.n_kv_head)}"
        yield view.problem(what, keys, do, defaults=[_row(recipe, "n_kv_head")])
    dimensions = (
        (TENSOR_PARALLEL_KEY, degrees.tensor, "d_ff", model.d_ff),
        (SEQUENCE_PARALLEL_KEY, degrees.sequence, "seq_len", model.seq_len),
    )
    for key, degree, name, size in dimensions:
        if size % degree:
            what = f"model.{name} is not divisible by {key}"
            do = f"set model.{name} to a multiple of {degree}"
            yield view.problem(what, [key], do, defaults=[_row(recipe, name)])
    yield from _ignored_autotp_keys(view)


def _ignored_autotp_keys(view: ConfigView) -> Iterator[Problem]:
    """Yield a problem for each key of DeepSpeed's AutoTP that has no effect because megagpt splits its own layers."""
    section = view.get("tensor_parallel", {})
    for name in section if isinstance(section, dict) else ():
        if name != "autotp_size" and view.is_valid(f"tensor_parallel.{name}"):
            what = f"tensor_parallel.{name} would be ignored: megagpt splits its layers itself"
            yield view.problem(what, [f"tensor_parallel.{name}"], "remove it; only autotp_size is needed")


def _row(recipe: Recipe, name: str) -> TableRow:
    key = f"model.{name}"
    location = recipe.location(key) or recipe.location("model.preset") or "default"
    return key, getattr(recipe.model, name), location


def _divisors(number: int) -> str:
    return join_words(str(count) for count in range(1, number + 1) if number % count == 0)
