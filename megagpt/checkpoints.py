"""`megagpt checkpoints` and `megagpt stop`: what a run has saved, and a request to save once more and end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.errors import UserError
from megagpt.run import checkpoint, status
from megagpt.run.stopping import REQUEST


@dataclass(frozen=True)
class Line:
    """One checkpoint; `wrong` says why it cannot be used ("": it can)."""

    name: str
    update: int | None
    tokens: int | None
    bytes: int | None
    layout: str
    pinned: bool
    wrong: str


@dataclass(frozen=True)
class Listing:
    """All checkpoints of a run, the oldest first; `verified`: every byte was read."""

    run: str
    verified: bool
    checkpoints: tuple[Line, ...]

    def __str__(self) -> str:
        rows = [f"{'update':>10}  {'tokens':>15}  {'size':>9}  {'layout':<24}  state"]
        whole = "whole" if self.verified else "complete"
        for line in self.checkpoints:
            said = line.wrong or whole + (", pinned" if line.pinned else "")
            if line.update is None or line.tokens is None or line.bytes is None:
                rows.append(f"{line.name}: {said}")
            else:
                size = f"{line.bytes / 1e6:,.1f} MB"
                rows.append(f"{line.update:>10,}  {line.tokens:>15,}  {size:>9}  {line.layout:<24}  {said}")
        return "\n".join(rows)


def checkpoints(run: Path, verify: bool) -> Listing:
    """Look at every checkpoint of a run: names and sizes, or with `verify` every byte. Raises UserError for none."""
    folders = checkpoint.Store(run).folders()
    if not folders:
        raise UserError("there is no checkpoint here", str(run / "checkpoints"), "name a run directory that has saved")
    return Listing(str(run), verify, tuple(_line(folder, verify) for folder in folders))


def stop(run: Path) -> status.Standing:
    """Leave a request that the training ranks find before their next update, or, if they still start, after it.

    How the run stands: where it is not running, nothing is left there. Raises UserError where there is no such folder.
    """
    standing = status.read(run)
    if standing.state == "running":
        files.replace_text(run / REQUEST, "")
        standing = status.read(run)  # it may have ended meanwhile, and have seen it or not
    if standing.state != "running":
        (run / REQUEST).unlink(missing_ok=True)
    return standing


def _line(folder: Path, verify: bool) -> Line:
    found, wrong = checkpoint.read(folder)
    pinned = (folder / checkpoint.PINNED).exists()
    if found is None:
        return Line(folder.name, None, None, None, "", pinned, wrong)
    wrong = checkpoint.check(folder)[1] if verify else checkpoint.incomplete(found)
    return Line(folder.name, found.state.update, found.state.tokens, found.bytes, _layout(found), pinned, wrong)


def _layout(found: checkpoint.Checkpoint) -> str:
    """The layout in a few words."""
    layout = found.facts["layout"]
    parts = [f"{layout['world_size']} ranks", f"ZeRO {layout['zero_stage']}"]
    for key in ("pipeline_stages", "tensor_parallel", "sequence_parallel"):
        parts += [f"{key.split('_')[0]} {layout[key]}"] if layout.get(key, 1) > 1 else []
    return ", ".join(parts)
