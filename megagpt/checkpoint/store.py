"""Checkpoints are published, not written: a folder exists whole under its name, or not at all.

Ranks write into a partial folder, each flushing and checksumming its own files; all tell all whether it went well;
rank 0 joins sizes and checksums into a manifest, renames the folder, and points `latest` at it. `latest` is a hint:
the manifest decides. Whatever fails on one rank before the rename is a failed save on every rank, and nothing else;
what fails after it is a note, for published is published.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megagpt import files
from megagpt.cluster import Agreement, Rank
from megagpt.files import WriteFile, parse_json
from megagpt.model.flops import CHECKPOINT_HEADROOM
from megagpt.state import TrainState

MANIFEST = "manifest.json"
PINNED = "PINNED"  # a file of this name in a checkpoint keeps it
_PARTIAL = ".partial_"

Report = tuple[str, Any]
"""What went wrong on this rank ("": nothing), and what it tells the others."""
Work = Callable[[], Report]
Steps = Generator[Work, Report, str]
"""The publication of one checkpoint: see `Store.publishing`."""


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint: its folder, where the run stood, and the rest of its manifest."""

    folder: Path
    state: TrainState
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        """The size of all its files."""
        return sum(file["bytes"] for file in self.facts["files"].values())


class SaveFailed(Exception):
    """A checkpoint could not be published; those before it are as they were. The same on every rank."""


@dataclass(frozen=True)
class Store:
    """Where the checkpoints of a run are published, and which are kept.

    Of the published ones, the newest `keep_last` stay (None: all), those whose update divides by `keep_every`, and
    pinned ones. `needed` is the space in bytes that a checkpoint takes at least.
    """

    run: Path
    rank: Rank = field(default_factory=Rank)
    agreement: Agreement = field(default_factory=lambda: Agreement(1))
    keep_last: int | None = None
    keep_every: int | None = None
    needed: int = 0

    @property
    def root(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.run / "checkpoints"

    def folder(self, update: int) -> Path:
        """Where the checkpoint of an update is published."""
        return self.root / f"update_{update:08d}"

    def publishing(self, state: TrainState, save_state: Callable[[WriteFile], None], facts: dict[str, Any]) -> Steps:
        """Save through `save_state`; `facts` go into the manifest.

        Each step that is yielded is file work of this rank alone, on whatever thread, and its report is sent back.
        All between is agreed by all ranks. Returns what went wrong after publication, "" for nothing. Raises
        SaveFailed, on every rank, whichever rank it happened on.
        """
        final = self.folder(state.update)
        partial = self.root / (_PARTIAL + final.name)
        self._agree((_problem(lambda: self._begin(partial)) if self.rank.main else "", None))
        written = self._agree((yield lambda: _write(partial, save_state)))
        whole = Checkpoint(partial, state, {**facts, "files": {k: v for part in written for k, v in part.items()}})
        notes: list[str] = self._agree((yield lambda: self._publish(whole, final)))
        return notes[0]

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint whose files are all there and whole, and a line for each newer one that is not."""
        skipped: list[str] = []
        names = parse_json(self.agreement.gather(json.dumps([folder.name for folder in self.folders()]))[0])
        for name in reversed(names):
            checkpoint, wrong = self.valid(name)
            if checkpoint is not None:
                return checkpoint, skipped
            skipped.append(wrong)
        return None, skipped

    def valid(self, name: str) -> tuple[Checkpoint | None, str]:
        """The checkpoint of this name if its files are all there and whole, or what is wrong with it.

        The ranks share the reading, and all get the same answer.
        """
        checkpoint, wrong = check(self.root / name, self.rank.rank, self.rank.world_size)
        reasons = [reason for reason in self.agreement.gather(wrong) if reason]
        return (None, f"{name}: {reasons[0]}") if reasons else (checkpoint, "")

    def folders(self) -> list[Path]:
        """All published checkpoints, the oldest first; a copy by another name is none."""
        return sorted(path for path in self.root.glob("update_*") if path.name.removeprefix("update_").isdecimal())

    def _begin(self, partial: Path) -> None:
        """Clear what a save that was cut short has left, see that there is room, and make the partial folder."""
        for leftover in [*self.root.glob(_PARTIAL + "*"), *self.root.glob(".removed_*")]:
            files.remove_tree(leftover)
        files.make_folder(partial)
        last = [checkpoint.bytes for folder in self.folders()[-1:] if (checkpoint := read(folder)[0])]
        needed, free = int(CHECKPOINT_HEADROOM * max([self.needed, *last])), shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(f"{self.root} has {free / 1e6:,.0f} MB free, a checkpoint needs {needed / 1e6:,.0f} MB")

    def _publish(self, whole: Checkpoint, final: Path) -> Report:
        """Rank 0's part: everything up to the rename may fail the save, nothing behind it may."""
        if not self.rank.main:
            return "", ""
        error = _problem(lambda: _seal(whole, final))
        return error, "" if error else _problem(lambda: self._point_at(final))

    def _point_at(self, final: Path) -> None:
        files.sync(self.root)  # the rename is on the disk before anything older goes
        files.replace_text(self.root / "latest", final.name + "\n")
        if self.keep_last is not None:
            self._remove_old(final, self.keep_last)

    def _remove_old(self, final: Path, keep_last: int) -> None:
        """Remove what is not to be kept; what is newer than `final` was passed over at the resume, and counts not."""
        older = [folder for folder in self.folders() if folder.name <= final.name]
        for folder in older[:-keep_last]:
            update = int(folder.name.removeprefix("update_"))
            if (self.keep_every and update % self.keep_every == 0) or (folder / PINNED).exists():
                continue
            files.remove_folder(folder)

    def _agree(self, report: Report) -> list[Any]:
        """What each rank tells. Raises SaveFailed if any rank has an error."""
        answers = [parse_json(text) for text in self.agreement.gather(json.dumps(report))]
        failed = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(answers) if problem]
        if failed:
            raise SaveFailed("; ".join(failed))
        return [told for _, told in answers]


def read(folder: Path) -> tuple[Checkpoint | None, str]:
    """A checkpoint by its manifest alone, or why it cannot be read."""
    try:
        first, _, rest = (folder / MANIFEST).read_bytes().partition(b",")
        if first != b'{"checksum": %d' % zlib.crc32(rest):
            return None, f"{MANIFEST} is damaged: its checksum differs"
        manifest = parse_json(b"{" + rest)
        for name, written in manifest["files"].items():
            files.WrittenFile(**written)
            if not isinstance(name, str) or {type(written["bytes"]), type(written["crc32"])} != {int}:
                raise ValueError(f"of {name}")
        return Checkpoint(folder, TrainState(**manifest.pop("state")), manifest), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{MANIFEST} cannot be read ({error})"


def check(folder: Path, part: int = 0, parts: int = 1) -> tuple[Checkpoint | None, str]:
    """A checkpoint whose files are all there, or what is wrong; every byte of each `parts`-th file is read."""
    checkpoint, wrong = read(folder)
    if checkpoint is None or (wrong := incomplete(checkpoint)):
        return None, wrong
    for number, (name, expected) in enumerate(checkpoint.facts["files"].items()):
        if number % parts == part:
            try:
                differs = files.crc32(folder / name) != expected["crc32"]
            except OSError as error:
                return None, f"{name} cannot be read ({_said(error)})"
            if differs:
                return None, f"{name} is damaged: its checksum differs"
    return checkpoint, ""


def newest_valid(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """`Store.newest_valid` for one process."""
    return Store(run).newest_valid()


def incomplete(checkpoint: Checkpoint) -> str:
    """What is wrong with a checkpoint as far as names and sizes tell."""
    for name, expected in checkpoint.facts["files"].items():
        path = checkpoint.folder / name
        if files.leads_out(path, checkpoint.folder):
            return f"{name} leads out of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
    return ""


def _seal(whole: Checkpoint, final: Path) -> None:
    """WriteFile the manifest of what all ranks have written, and give the folder its name."""
    if wrong := incomplete(whole):
        raise OSError(f"{wrong} where rank 0 looks: all ranks need the same run directory")
    for folder in {(whole.folder / name).parent for name in whole.facts["files"]}:
        files.sync(folder)
    body = json.dumps({"state": asdict(whole.state), **whole.facts}, indent=1)[1:] + "\n"
    files.write(whole.folder / MANIFEST, f'{{"checksum": {zlib.crc32(body.encode())},{body}'.encode())
    files.sync(whole.folder)
    files.remove_folder(final)  # a damaged one of the same update, which resume passed over
    files.rename(whole.folder, final)


class _Recorder:
    """Writes the files of one rank and remembers what they hold.

    It never raises: other ranks may be waiting in a collective of the same save. After an error it writes no more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.error = ""
        self.written: dict[str, dict[str, int]] = {}

    def __call__(self, name: str, data: bytes) -> None:
        self.error = self.error or _problem(lambda: self._write(name, data))

    def _write(self, name: str, data: bytes) -> None:
        files.make_folder((self._folder / name).parent)
        self.written[name] = asdict(files.write(self._folder / name, data))


def _write(partial: Path, save_state: Callable[[WriteFile], None]) -> Report:
    """Every rank's part: its files, flushed."""
    recorder = _Recorder(partial)
    save_state(recorder)
    return recorder.error, recorder.written


def _problem(work: Callable[[], None]) -> str:
    """Do the work; what the disk says against it, "" for nothing."""
    try:
        work()
    except OSError as problem:
        return _said(problem)
    return ""


def _said(problem: OSError) -> str:
    where = f" ({problem.filename})" if problem.filename else ""
    return f"{problem.strerror or problem}{where}"
