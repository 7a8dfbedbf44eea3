"""What DeepSpeed's engines share: the config they get, and their end."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from megagpt.config.deepspeed import Resolved
from megagpt.engine.state.rng_and_loss_scale import SideState


def config(resolved: Resolved) -> dict[str, Any]:
    """The config for deepspeed.initialize: without what DeepSpeed is not told, since engine/ does it itself."""
    ours = ("tensor_parallel", "sequence_parallel_size", "train_batch_size")  # the last counts sequence parts
    return {key: value for key, value in resolved.config.items() if key not in ours}


def take_back(engine: Any, before: SideState, with_scale: bool) -> None:
    """Undo what an update that was not made has moved all the same."""
    before.restore(with_scale)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
        # with bf16 and offload the bad gradient stays, and the next one is added to it (stage_1_and_2.py, step)
        for group in engine.optimizer.averaged_gradients:
            engine.optimizer.averaged_gradients[group] = None


def release(engine: Any) -> None:
    """Free what an engine holds, and the process groups that DeepSpeed would use for the next engine too."""
    engine.destroy()
    groups.mpu = None
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of ZeRO++: the next engine would take it for its own
