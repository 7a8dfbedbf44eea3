"""All patches of DeepSpeed's private attributes, with one function or class for each patch.

Each docstring names the lines of DeepSpeed 0.19.8 that make the patch necessary, and the test that fails once the patch
is no longer needed. Tests without a file name are in tests/unit/engine/test_deepspeed_faults.py.

Other modules read private attributes (engine/state/flat_buffers.py and partitions.py) or override private methods of
PipelineModule in a subclass (engine/parallel/pipeline_stages.py), but they do not patch anything.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor
from torch.distributed import distributed_c10d

from megagpt.engine import grad_norm
from megagpt.engine.state import loss_scale
from megagpt.engine.state.rng_and_loss_scale import RngAndLossScaleSnapshot

# Number of fp32 elements in the widest vector register of a CPU (AVX-512).
_VECTOR_ELEMENTS = 16
# Number of elements to which DeepSpeed aligns partitions (nccl_start_alignment_factor).
_ALIGNED_ELEMENTS = 2
_FLATTEN_METHODS = (
    (DeepSpeedZeroOptimizer, "flatten_dense_tensors_aligned"),
    (BF16_Optimizer, "_flatten_dense_tensors_aligned"),
)


def skip_shared_memory_operator() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, which only inference uses.

    With gloo, comm/torch.py:49 builds the operator at every start if ops/__init__.py:31 lists it as compatible, which
    takes minutes. This patch adds one entry to that list. Computing the whole list would run the C compiler.
    Test: test_the_shared_memory_operator_is_built_if_it_is_listed_as_compatible.
    """
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False


def set_default_group_timeout(limit: timedelta) -> None:
    """Make `limit` the timeout of every process group, including those that DeepSpeed creates.

    comm/torch.py:540 creates groups, such as those of ZeRO, without a timeout, so torch's default applies to them.
    Test: tests/unit/engine/test_time_limits.py.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, name, limit)


def release(engine: Any) -> None:
    """Free an engine, and forget the process groups that DeepSpeed would otherwise reuse for the next engine.

    The groups are global variables (utils/groups.py:48 and :50) that runtime/engine.py:1243 (`destroy`) does not reset.
    Test: test_a_destroyed_engine_leaves_its_process_groups_to_the_next_one.
    """
    engine.destroy()
    groups.mpu = None
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # the group of ZeRO++'s hierarchical partitioning


def undo_skipped_step(engine: Any, snapshot: RngAndLossScaleSnapshot, with_loss_scale: bool) -> None:
    """Restore the RNG state and the loss scale after a skipped update, and discard the rejected gradient.

    In bf16 with an offloaded optimizer, runtime/zero/stage_1_and_2.py:3056 keeps the rejected gradient and adds the
    next one to it. Test: test_in_bf16_with_offload_a_rejected_gradient_is_kept.

    Args:
        engine: The DeepSpeed engine that skipped the update.
        snapshot: The state before the update.
        with_loss_scale: Whether to restore the loss scale as well.
    """
    snapshot.restore(with_loss_scale)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None


def configure_loss_scale(optimizer: Any) -> None:
    """Increase the fp16 loss scale after the step instead of before it, and tolerate an overflow at its minimum.

    runtime/zero/stage_1_and_2.py:3047 and stage3.py:2826 double the scale first, and then divide the gradient by it,
    although the gradient was computed with the old scale. As a result, one update in `loss_scale_window` uses half its
    gradient. If the scale is at its minimum, fp16/loss_scaler.py raises an error on overflow. In megagpt, however, the
    training loop decides when to stop a run, and it may have rejected the update itself.
    Test: test_in_fp16_an_update_that_doubles_the_scale_uses_half_its_gradient.
    """
    scaler = loss_scale.dynamic_scaler(optimizer)
    if scaler is None:
        return
    scaler.raise_error_at_min_scale = False
    update_scale = scaler.update_scale
    step = optimizer.step

    def update_scale_on_overflow(overflow: bool) -> None:
        if overflow:  # the step is skipped, so `step_and_update_scale` does not lower the scale
            update_scale(True)

    def step_and_update_scale(*arguments: Any) -> Any:
        result = step(*arguments)
        if not optimizer.overflow:
            update_scale(False)
        return result

    scaler.update_scale = update_scale_on_overflow
    optimizer.step = step_and_update_scale


class ClipBeforeStep:
    """Hook that clips the whole gradient just before the optimizer's step, for ZeRO stage 0 in fp32.

    At that stage, runtime/engine.py:3503 clips without reporting the norm. The hook removes a gradient that is not
    finite, so that the optimizer changes nothing. runtime/engine.py:3536 then reads the attribute `overflow` and does
    not advance the learning rate schedule. Test: test_at_stage_0_there_is_no_gradient_norm.

    Attributes:
        norm: Norm of the last gradient before clipping.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any, limit: float | None) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = optimizer
        self._limit = limit
        self.norm = 0.0
        optimizer.register_step_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        """Clip the gradients, or remove them if they are not finite. torch calls this before each step."""
        self.norm = grad_norm.clip(self._parameters, self._limit)
        self._optimizer.overflow = not math.isfinite(self.norm)
        if self._optimizer.overflow:
            for parameter in self._parameters:
                parameter.grad = None


def configure_grad_norm(optimizer: Any) -> None:
    """Make DeepSpeed's optimizers for ZeRO stages 1 and 2 compute the gradient norm in fp64 with one all-reduce.

    runtime/zero/stage_1_and_2.py:2943 (`scaled_global_norm`) all-reduces over the pipeline stages once per parameter
    group, so pipeline stages with different numbers of groups wait for each other forever. The bf16 optimizer fails on
    a pipeline stage that holds only the copy of a tied matrix, because runtime/utils.py:931 stacks an empty list. It
    also sums in fp32, which makes the norm of a long vector depend on how the vector is partitioned. ZeRO stage 3 needs
    no patch, because it is never combined with a pipeline and already sums in fp64.
    Tests: test_each_parameter_group_is_reduced_over_the_stages_by_itself, test_the_norm_of_no_gradients_fails.
    """
    if isinstance(optimizer, BF16_Optimizer):
        _configure_bf16_grad_norm(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        optimizer.scaled_global_norm = lambda norm_type=2: _norm_over_ranks(optimizer)


def _configure_bf16_grad_norm(optimizer: Any) -> None:
    """Pass this rank's gradient norm to DeepSpeed instead of its gradients.

    DeepSpeed then computes the norm of a single number, which is that number.
    """
    all_gradients = optimizer.get_grads_for_norm

    def get_grads_for_norm(for_clipping: bool = False) -> Any:
        gradients = all_gradients(for_clipping)
        if for_clipping:
            return gradients
        total = torch.zeros((), dtype=torch.float64, device=optimizer.bf16_groups_flat[0].device)
        for gradient in gradients[0]:
            total += grad_norm.square_sum(gradient)
        return [total.sqrt().float()], gradients[1]

    optimizer.get_grads_for_norm = get_grads_for_norm


def _norm_over_ranks(optimizer: Any) -> Tensor:
    """Return the gradient norm over all ranks, multiplied by the fp16 loss scale.

    The norm is infinite if a gradient is not finite.
    """
    device = torch.device("cpu") if optimizer.cpu_offload else optimizer.bit16_groups_flat[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for group, parameters in enumerate(optimizer.params_in_partition):
        for square in _square_sums(optimizer, group, parameters):
            total += square
    total = total.to(optimizer.bit16_groups_flat[0].device)  # NCCL cannot reduce tensors in host memory
    torch.distributed.all_reduce(total, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=total, op=torch.distributed.ReduceOp.SUM)
    norm = total.sqrt().float().to(optimizer.device)
    return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, math.inf))


def _square_sums(optimizer: Any, group: int, parameters: Sequence[Any]) -> Iterator[Tensor]:
    """Yield the sum of squares of each gradient in this rank's partition of a parameter group.

    A parameter that is replicated on several pipeline stages or tensor-parallel ranks is counted on only one of them.
    """
    if optimizer.cpu_offload:
        # The gradients are no longer on the device, and DeepSpeed has already computed their norms in fp64.
        norms = optimizer.norm_for_param_grads
        squares = (norms[optimizer.get_param_id(p)].double().cpu().square() for p in parameters)
    else:
        gradients = optimizer.averaged_gradients[group]
        squares = (grad_norm.square_sum(g) for g in gradients if not getattr(g, "_zero_padding", False))
    for parameter, square in zip(parameters, squares, strict=False):
        replicated = getattr(parameter, "ds_pipe_replicated", False)
        if not replicated and (is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0):
            yield square


@contextlib.contextmanager
def partitions_of_whole_vectors() -> Iterator[None]:
    """Return a context in which DeepSpeed pads the flat buffers of new optimizers to whole CPU vectors per rank.

    torch's fused AdamW computes the last elements of a tensor, which do not fill a vector, one by one and rounds them
    differently. The copies of a tied matrix have different offsets in the flat buffers of two pipeline stages, so they
    would slowly diverge. runtime/zero/stage_1_and_2.py and runtime/bf16_optimizer.py align partitions to 2 elements.
    Test: tests/parity/test_fuzz.py, which compares tied copies bit by bit.
    """
    originals = [getattr(owner, name) for owner, name in _FLATTEN_METHODS]

    def aligned(flatten: Any) -> Any:
        def flatten_to_vectors(optimizer: Any, tensors: Any, alignment: int, **options: Any) -> Any:
            return flatten(optimizer, tensors, alignment * _VECTOR_ELEMENTS // _ALIGNED_ELEMENTS, **options)

        return flatten_to_vectors

    for (owner, name), original in zip(_FLATTEN_METHODS, originals, strict=True):
        setattr(owner, name, aligned(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(_FLATTEN_METHODS, originals, strict=True):
            setattr(owner, name, original)


def call_before_tied_reduction(engine: Any, callback: Callable[[], None]) -> None:
    """Call `callback` on every pipeline stage after its last backward pass, before tied gradients are reduced.

    PipelineEngine has no callback for this moment, so this patch replaces an entry of its instruction table
    (runtime/pipe/engine.py:1360). Test: tests/parity/test_skipped_updates.py, which checks when the callback runs.
    """
    instructions = engine._INSTRUCTION_MAP
    reduce_tied_gradients = instructions[ReduceTiedGrads]

    def call_and_reduce(engine: Any) -> None:
        callback()
        reduce_tied_gradients(engine)

    engine._INSTRUCTION_MAP = {**instructions, ReduceTiedGrads: call_and_reduce}


def with_accumulated_gradients(pairs: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Replace each tied weight by an object whose attribute `grad` is the accumulated gradient of the weight.

    runtime/pipe/engine.py:269 (`_exec_reduce_tied_grads`) sums `weight.grad` over the pairs that
    PipelineModule.get_tied_weights_and_groups returns. In bf16 with an offloaded optimizer, `weight.grad` is None,
    because ZeRO accumulates gradients in `weight.grad_accum`. Without this patch, each copy of the matrix would be
    trained separately. Test: test_with_bf16_and_offload_gradients_are_not_in_grad.

    Args:
        pairs: Pairs of a tied weight and the process group of the stages that share it.

    Returns:
        Pairs of the replacement and the process group. A weight without the attribute `grad_accum` is not replaced.
    """
    replaced = []
    for weight, group in pairs:
        gradient = getattr(weight, "grad_accum", None)
        replaced.append((weight if gradient is None else SimpleNamespace(grad=gradient), group))
    return replaced
