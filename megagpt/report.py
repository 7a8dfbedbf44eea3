"""Implementation of `megagpt report`, which plots the loss curve of a run as an SVG file and in the terminal."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.errors import MachineError, UserError, without_controls
from megagpt.training import metrics

PICTURE = "loss.svg"


@dataclass(frozen=True)
class LossCurve:
    """Loss (in nats per token) as a function of the number of tokens trained on.

    Attributes:
        tokens: number of tokens trained on after each update.
        loss: training loss of each update.
        validation_tokens: number of tokens trained on at each validation.
        validation_loss: validation loss of each validation.
    """

    tokens: list[int]
    loss: list[float]
    validation_tokens: list[int]
    validation_loss: list[float]


def read_curve(run: Path) -> LossCurve:
    """Read the loss curve of a run directory. Raises UserError if no update has been recorded."""
    path = run / metrics.NAME
    if not path.exists():
        raise UserError("there is nothing to report", f"{path} does not exist", "give a run directory")
    updates = list(metrics.read(run, "update"))
    if not updates:
        raise UserError("there is nothing to report", f"{path} holds no update", "train first")
    tokens_at = {record["update"]: record["tokens"] for record in updates}
    validations = [record for record in metrics.read(run, "validation") if record["update"] in tokens_at]
    return LossCurve(
        tokens=[record["tokens"] for record in updates],
        loss=[record["loss"] for record in updates],
        validation_tokens=[tokens_at[record["update"]] for record in validations],
        validation_loss=[record["loss"] for record in validations],
    )


def draw_as_svg(run: Path) -> Path:
    """Plot the curve as an SVG file in the run directory, and return the path of the file."""
    from matplotlib.figure import Figure  # pyplot is not used, because it needs a display and keeps global state.

    curve = read_curve(run)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.tokens, curve.loss, linewidth=0.8, alpha=0.6, label="training, each update")
    axes.plot(curve.validation_tokens, curve.validation_loss, marker="o", label="validation")
    axes.set(xlabel="tokens trained on", ylabel="loss, nats per token")
    axes.set_title(without_controls(run.name), parse_math=False)  # A "$" in the name does not begin a formula.
    axes.grid(alpha=0.3)
    axes.legend()
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    try:
        files.replace_text(run / PICTURE, svg.getvalue())
    except OSError as error:
        do = "copy the run directory to a place that you may write to, and run `megagpt report` there"
        raise MachineError(f"the picture cannot be written: {error.strerror}", str(run / PICTURE), do) from None
    return run / PICTURE


def draw_as_text(run: Path, color: bool) -> str:
    """Plot the curve with text characters, 88 columns wide, for a terminal or a log.

    Args:
        run: the run directory.
        color: whether to use terminal colors.

    Returns:
        The plot as text.
    """
    import plotext

    curve = read_curve(run)
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(88, 18)
    plotext.plot(_millions(curve.tokens), curve.loss, label="training", marker="braille")
    if curve.validation_loss:
        plotext.scatter(_millions(curve.validation_tokens), curve.validation_loss, label="validation", marker="o")
    plotext.title("loss, nats per token")
    plotext.xlabel("million tokens")
    text: str = plotext.build()
    return text if color else plotext.uncolorize(text)


def _millions(tokens: list[int]) -> list[float]:
    return [count / 1e6 for count in tokens]
