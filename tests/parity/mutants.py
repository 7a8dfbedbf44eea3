"""Planted bugs, each of which changes what is trained, so that the comparison with the reference must fail.

A bug is planted on all ranks of a layout while its engine is built and trained, but not in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megagpt.data.loader import Batch
from megagpt.engine import deepspeed_patches, init_model, wrapper, zero
from megagpt.engine.optim import build, lr_schedule
from megagpt.engine.zero import ZeroEngine
from megagpt.model.attention import Attention
from megagpt.model.layers import Head, PositionEmbedding
from tests.parity import layouts, mutants_parallel
from tests.parity.layouts import Case

Wrapper = Callable[..., Any]  # called with the original function and its arguments


@dataclass(frozen=True)
class Mutant:
    """A planted bug: calls of `owner.name` call `wrapper`, with the original function as the first argument."""

    case: Case
    owner: Any
    name: str
    wrapper: Wrapper

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Plant the bug for the duration of the `with` block."""
        original = getattr(self.owner, self.name)
        with patch.object(self.owner, self.name, lambda *args, **more: self.wrapper(original, *args, **more)):
            yield


def _case(id: str, stage: int) -> Case:
    return Case(f"mutant-{id}", 2, layouts.zero(stage, 3))


def _after_update(change: Callable[[Any, list[torch.Tensor]], None]) -> Wrapper:
    """Return a wrapper of train_update that calls `change` after each update, with the weights before and after it."""

    def wrapper(original: Wrapper, engine: ZeroEngine, batches: list[Batch]) -> Any:
        parameters = list(engine._engine.module.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        result = original(engine, batches)
        with torch.no_grad():
            change(parameters, before)
        return result

    return wrapper


def _mean_of_means(original: Wrapper, engine: ZeroEngine, batch: Batch, normalizer: float) -> Any:
    return original(engine, batch, float((batch.labels != -100).sum()))


def _drop_last(original: Wrapper, engine: ZeroEngine, batch: Batch, normalizer: float) -> Any:
    last = engine._engine.is_gradient_accumulation_boundary() and torch.is_grad_enabled()
    return original(engine, batch, normalizer) * (0.0 if last else 1.0)


def _tied_times(factor: float) -> Wrapper:
    def wrapper(original: Wrapper, *args: Any) -> Any:
        model = original(*args)
        model.layers[0].weight.register_hook(lambda gradient: gradient * factor)
        return model

    return wrapper


def _head_without_gradient(original: Wrapper, head: Head) -> torch.Tensor:
    return original(head).detach()


def _local_clip(original: Wrapper, wrapped: Any, gradients: list[torch.Tensor], norm: torch.Tensor) -> Any:
    mine = torch.sqrt(sum(gradient.float().square().sum() for gradient in gradients))
    return original(wrapped, gradients, mine)


def _clip_each(original: Wrapper, clip: Any, *args: Any) -> None:
    original(clip, *args)
    for parameter in clip._parameters:
        torch.nn.utils.clip_grad_norm_([parameter], 0.3)


def _no_clip(original: Wrapper, wrapped: Any, gradients: Any, norm: torch.Tensor) -> Any:
    return original(wrapped, gradients, norm * 0 + 1e-9)


def _same_samples(original: Wrapper, samples: Any, layout: Any, rank: Any) -> list[Batch]:
    return original(samples, layout, replace(rank, rank=0))


def _one_sample_late(original: Wrapper, samples: Any, layout: Any, rank: Any) -> list[Batch]:
    return original(tuple(torch.cat((tensor[1:], tensor[1:2])) for tensor in samples), layout, rank)


def _shifted_labels(original: Wrapper, samples: Any, layout: Any, rank: Any) -> list[Batch]:
    return original((samples[0], samples[1].roll(-1, dims=1)), layout, rank)


def _stale(parameters: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    parameters[2].copy_(before[2])


def _rounded(parameters: list[torch.Tensor], before: list[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.bfloat16())


def _groups(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Wrapper:
    return lambda original, *args: change(original(*args))


def _all_decay(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "weight_decay": 0.1} for group in groups]


def _slow_rest(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [groups[0], {**groups[1], "lr": groups[1]["lr"] / 10}]


def _other_beta(original: Wrapper, *args: Any, **more: Any) -> Any:
    built = original(*args, **more)
    for group in built.param_groups:
        group["betas"] = (group["betas"][0], 0.999)
    return built


def _sees_the_future(original: Wrapper, attention: Attention, q: Any, k: Any, v: Any, **more: Any) -> Any:
    heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)


def _no_positions(original: Wrapper, layer: PositionEmbedding, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
    return hidden + layer.weight[0]


def _one_step_ahead(original: Wrapper, *args: Any) -> Any:
    scheduler = original(*args)
    scheduler.step()
    return scheduler


_BUGS: dict[str, tuple[int, Any, str, Wrapper]] = {
    "loss-averaged-by-micro-batch": (1, ZeroEngine, "_forward", _mean_of_means),
    "last-micro-batch-dropped": (2, ZeroEngine, "_forward", _drop_last),
    "ignored-labels-counted": (1, wrapper, "valid_tokens", lambda _, batch: batch.labels.numel()),
    "tied-gradient-halved": (1, zero, "init_model", _tied_times(0.5)),
    "tied-gradient-doubled": (0, zero, "init_model", _tied_times(2.0)),
    "head-without-gradient": (2, Head, "matrix", _head_without_gradient),
    "rate-one-update-early": (1, lr_schedule, "build", _one_step_ahead),
    "clipped-by-the-local-norm": (1, DeepSpeedZeroOptimizer, "unscale_and_clip_grads", _local_clip),
    "not-clipped": (2, DeepSpeedZeroOptimizer, "unscale_and_clip_grads", _no_clip),
    "clipped-tensor-by-tensor": (0, deepspeed_patches.ClipBeforeStep, "__call__", _clip_each),
    "gradients-not-reduced": (0, DeepSpeedEngine, "allreduce_gradients", lambda *_, **__: None),
    "gradients-not-cleared": (0, DeepSpeedEngine, "zero_grad", lambda *_: None),
    "two-ranks-read-the-same": (1, layouts, "share", _same_samples),
    "samples-one-late": (1, layouts, "share", _one_sample_late),
    "labels-shifted-twice": (1, layouts, "share", _shifted_labels),
    "weights-stale-after-gather": (1, ZeroEngine, "train_update", _after_update(_stale)),
    "weights-rounded-to-bf16": (0, ZeroEngine, "train_update", _after_update(_rounded)),
    "norms-and-biases-decay": (1, build, "_parameter_groups", _groups(_all_decay)),
    "norms-and-biases-learn-slowly": (2, build, "_parameter_groups", _groups(_slow_rest)),
    "another-beta": (1, build, "build", _other_beta),
    "attention-sees-the-future": (2, Attention, "attend", _sees_the_future),
    "all-tokens-at-one-position": (3, PositionEmbedding, "forward", _no_positions),
    "initial-values-of-another-seed": (3, init_model, "initial_value", lambda f, n, s, m, seed: f(n, s, m, seed + 1)),
}
MUTANTS = {f"mutant-{id}": Mutant(_case(id, bug[0]), *bug[1:]) for id, bug in _BUGS.items()}
MUTANTS |= {
    f"mutant-{id}": Mutant(Case(f"mutant-{id}", 2, config, recipe), *bug)
    for bugs, recipe in ((mutants_parallel.BUGS, ()), (mutants_parallel.MUON_BUGS, layouts.MUON))
    for id, (config, *bug) in bugs.items()
}
SEEDS = tuple(Case(f"seed-{seed}", 2, layouts.zero(seed % 4, 3), (f"seed={seed}",)) for seed in range(100, 120))
