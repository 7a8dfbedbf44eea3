"""List and verify the checkpoints of a run (`megagpt checkpoints`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megagpt.checkpoint import store
from megagpt.config.deepspeed import Layout
from megagpt.errors import UserError


@dataclass(frozen=True)
class ListedCheckpoint:
    """One checkpoint of a run. `update`, `tokens` and `bytes` are None if its manifest cannot be read."""

    name: str
    update: int | None
    tokens: int | None
    bytes: int | None
    layout: str
    pinned: bool
    """whether the checkpoint is exempt from automatic removal"""
    wrong: str
    """reason why the checkpoint cannot be used, or "" if it can"""


@dataclass(frozen=True)
class CheckpointList:
    """All checkpoints of a run, oldest first. `verified` is True if the checksums of all files were compared."""

    run: str
    verified: bool
    checkpoints: tuple[ListedCheckpoint, ...]

    def __str__(self) -> str:
        width = max(len("layout"), *(len(listed.layout) for listed in self.checkpoints))
        rows = [f"{'update':>10}  {'tokens':>15}  {'size':>9}  {'layout':<{width}}  state"]
        for listed in self.checkpoints:
            state = listed.wrong or self._good_state(listed)
            if listed.update is None or listed.tokens is None or listed.bytes is None:
                rows.append(f"{listed.name}: {state}")
            else:
                size = f"{listed.bytes / 1e6:,.1f} MB"
                rows.append(f"{listed.update:>10,}  {listed.tokens:>15,}  {size:>9}  {listed.layout:<{width}}  {state}")
        return "\n".join(rows)

    def _good_state(self, listed: ListedCheckpoint) -> str:
        state = "verified" if self.verified else "complete"
        return f"{state}, pinned" if listed.pinned else state


def checkpoints(run: Path, verify: bool) -> CheckpointList:
    """List the checkpoints of a run, and check the names and sizes of their files.

    Args:
        run: the run directory.
        verify: whether to also read all files and compare their checksums.

    Returns:
        The list of checkpoints, including damaged ones.

    Raises:
        UserError: if the run has no checkpoint.
    """
    folders = store.Store(run).folders()
    if not folders:
        raise UserError(
            "there is no checkpoint here", str(run / "checkpoints"), "give a run directory that has checkpoints"
        )
    return CheckpointList(str(run), verify, tuple(_inspect(folder, verify) for folder in folders))


def _inspect(folder: Path, verify: bool) -> ListedCheckpoint:
    found, problem = store.read_manifest(folder)
    pinned = (folder / store.PINNED).exists()
    if found is None:
        return ListedCheckpoint(folder.name, None, None, None, layout="", pinned=pinned, wrong=problem)
    return ListedCheckpoint(
        folder.name,
        found.state.update,
        found.state.tokens,
        found.bytes,
        layout=str(Layout.from_record(found.facts["layout"])),
        pinned=pinned,
        wrong=store.verify(folder)[1] if verify else store.find_incomplete(found),
    )
