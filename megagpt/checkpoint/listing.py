"""`megagpt checkpoints` and `megagpt stop`: list the checkpoints of a run, and request that it saves and stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagpt import files
from megagpt.checkpoint import store
from megagpt.config.deepspeed import Layout
from megagpt.errors import UserError
from megagpt.training import status
from megagpt.training.stop_signals import REQUEST


@dataclass(frozen=True)
class CheckpointLine:
    """One checkpoint. Fields are None or "" if its manifest cannot be read."""

    name: str
    update: int | None
    tokens: int | None
    bytes: int | None
    layout: str
    pinned: bool
    """whether the checkpoint is never deleted"""
    wrong: str
    """why the checkpoint cannot be used; "" if it can"""


@dataclass(frozen=True)
class CheckpointList:
    """All checkpoints of a run, oldest first."""

    run: str
    verified: bool
    """whether every byte was read"""
    checkpoints: tuple[CheckpointLine, ...]

    def __str__(self) -> str:
        width = max(len(line.layout) for line in self.checkpoints)
        width = max(width, len("layout"))
        rows = [f"{'update':>10}  {'tokens':>15}  {'size':>9}  {'layout':<{width}}  state"]
        for line in self.checkpoints:
            state = line.wrong or ("verified" if self.verified else "complete")
            if line.pinned and not line.wrong:
                state += ", pinned"
            if line.update is None or line.tokens is None or line.bytes is None:
                rows.append(f"{line.name}: {state}")
            else:
                size = f"{line.bytes / 1e6:,.1f} MB"
                rows.append(f"{line.update:>10,}  {line.tokens:>15,}  {size:>9}  {line.layout:<{width}}  {state}")
        return "\n".join(rows)


def checkpoints(run: Path, verify: bool) -> CheckpointList:
    """List the checkpoints of a run.

    Args:
        run: the run directory.
        verify: read every byte and compare checksums. Otherwise only names and sizes of files are checked.

    Raises:
        UserError: if there are none.
    """
    folders = store.Store(run).folders()
    if not folders:
        where = str(run / "checkpoints")
        raise UserError("there is no checkpoint here", where, "give a run directory that has checkpoints")
    return CheckpointList(str(run), verify, tuple(_line(folder, verify) for folder in folders))


def stop(run: Path) -> status.Standing:
    """Create the stop file of a running run. Its ranks find it before their next update, or once they have started.

    If the run is not running, no stop file is left behind. Returns the status of the run. Raises UserError if there is
    no such run directory.
    """
    standing = status.read(run)
    if standing.state == "running":
        files.replace_text(run / REQUEST, "")
        standing = status.read(run)  # it may have ended in the meantime, whether or not it found the file
    if standing.state != "running":
        (run / REQUEST).unlink(missing_ok=True)
    return standing


def _line(folder: Path, verify: bool) -> CheckpointLine:
    found, wrong = store.read(folder)
    pinned = (folder / store.PINNED).exists()
    if found is None:
        return CheckpointLine(folder.name, None, None, None, "", pinned, wrong)
    wrong = store.check(folder)[1] if verify else store.incomplete(found)
    layout = str(Layout.from_record(found.facts["layout"]))
    return CheckpointLine(folder.name, found.state.update, found.state.tokens, found.bytes, layout, pinned, wrong)
