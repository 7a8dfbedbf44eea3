"""fp16's dynamic loss scale, changed when DeepSpeed has done with it."""

from __future__ import annotations

from typing import Any


def change_after_the_step(optimizer: Any) -> None:
    """Let the scale grow when the step is over, not before.

    DeepSpeed 0.19.8 doubles it first and then divides by it a gradient that was made with the old one
    (stage_1_and_2.py and stage3.py, step): every `loss_scale_window` updates, one uses half its gradient.
    """
    scaler = getattr(optimizer, "loss_scaler", None)
    if scaler is None or not scaler.dynamic:
        return
    change, step = scaler.update_scale, optimizer.step

    def only_down(overflow: bool) -> None:
        if overflow:  # there is no step
            change(True)

    def step_then_up(*arguments: Any) -> Any:
        result = step(*arguments)
        if not optimizer.overflow:
            change(False)
        return result

    scaler.update_scale, optimizer.step = only_down, step_then_up
