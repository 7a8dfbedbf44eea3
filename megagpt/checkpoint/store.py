"""Publish checkpoints atomically, so that a folder with the final name of a checkpoint is always complete.

Every rank writes its files into a partial folder, flushes them, and computes their checksums. All ranks exchange
whether that succeeded. Rank 0 then writes all sizes and checksums to a manifest, renames the folder, and writes its
name to the file `latest`, which megagpt itself does not read. A failure on any rank before the rename makes the save
fail on every rank. A failure after the rename is only reported, because the checkpoint has already been published.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megagpt import files
from megagpt.cluster import Collectives, Rank
from megagpt.files import WriteFile, parse_json
from megagpt.model.flops import CHECKPOINT_HEADROOM
from megagpt.state import TrainState

MANIFEST = "manifest.json"
PINNED = "PINNED"  # a file with this name in a checkpoint's folder exempts the checkpoint from removal
_PARTIAL = ".partial_"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with its folder, the training state, and all other values of its manifest."""

    folder: Path
    state: TrainState
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Total size of the files in bytes."""
        return sum(file["bytes"] for file in self.facts["files"].values())


@dataclass(frozen=True)
class Outcome:
    """Outcome of one rank's file work, with an error message ("" if there was none) and a value for the other ranks."""

    error: str = ""
    value: Any = None


@dataclass(frozen=True)
class Store:
    """Store of a run's checkpoints, which publishes new checkpoints and removes old ones.

    Args:
        run: the run directory.
        rank: this rank.
        collectives: the collectives of the job.
        keep_last: number of newest checkpoints to keep, or None to keep all.
        keep_every: interval in updates. Checkpoints of updates that are multiples of it are kept, and so are pinned
            checkpoints.
        min_bytes: lower bound of the size of a checkpoint in bytes, for checking the free disk space.
    """

    run: Path
    rank: Rank = field(default_factory=Rank)
    collectives: Collectives = field(default_factory=lambda: Collectives(1))
    keep_last: int | None = None
    keep_every: int | None = None
    min_bytes: int = 0

    @property
    def root(self) -> Path:
        """Folder that contains the run's checkpoints."""
        return self.run / "checkpoints"

    def folder(self, update: int) -> Path:
        """Return the folder in which the checkpoint of an update is published."""
        return self.root / f"update_{update:08d}"

    def folders(self) -> list[Path]:
        """Return the folders of all published checkpoints, oldest first. Ignores copies under other names."""
        return sorted(path for path in self.root.glob("update_*") if path.name.removeprefix("update_").isdecimal())

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """Find the newest checkpoint whose files are all present and undamaged. Collective.

        Returns:
            The checkpoint (None if there is none), and a line for each newer checkpoint that is damaged.
        """
        damaged: list[str] = []
        names = self.collectives.all_gather_object([folder.name for folder in self.folders()])[0]
        for name in reversed(names):
            checkpoint, problem = self.valid(name)
            if checkpoint is not None:
                return checkpoint, damaged
            damaged.append(problem)
        return None, damaged

    def valid(self, name: str) -> tuple[Checkpoint | None, str]:
        """Verify a checkpoint. Each rank reads some of its files. Collective.

        Returns:
            The checkpoint and "" if its files are all present and undamaged, or None and the problem otherwise. The
            result is the same on every rank.
        """
        checkpoint, problem = verify(self.root / name, self.rank.rank, self.rank.world_size)
        problems = [problem for problem in self.collectives.all_gather_object(problem) if problem]
        return (None, f"{name}: {problems[0]}") if problems else (checkpoint, "")

    def make_partial(self, partial: Path) -> None:
        """Remove leftovers of interrupted saves, and create a partial folder.

        Raises OSError if there is not enough free space.
        """
        for leftover in [*self.root.glob(_PARTIAL + "*"), *self.root.glob(".removed_*")]:
            files.remove_tree(leftover)
        files.make_folder(partial)
        previous = [checkpoint.bytes for folder in self.folders()[-1:] if (checkpoint := read_manifest(folder)[0])]
        needed = int(CHECKPOINT_HEADROOM * max([self.min_bytes, *previous]))
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise OSError(f"{self.root} has {free / 1e6:,.0f} MB free, a checkpoint needs {needed / 1e6:,.0f} MB")

    def gather_outcomes(self, outcome: Outcome) -> tuple[str, list[Any]]:
        """Exchange the outcomes of file work between all ranks. Collective.

        Returns:
            The errors of all ranks in one string ("" if there was none), and the value of each rank.
        """
        outcomes = [Outcome(*pair) for pair in self.collectives.all_gather_object([outcome.error, outcome.value])]
        errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        return "; ".join(errors), [outcome.value for outcome in outcomes]

    def retain(self, newest: Path) -> None:
        """Write the name of the newest checkpoint to the file `latest`, and remove old checkpoints."""
        files.sync(self.root)  # the rename must be on disk before older checkpoints are removed
        files.replace_text(self.root / "latest", newest.name + "\n")
        if self.keep_last is not None:
            self._remove_old(newest, self.keep_last)

    def _remove_old(self, newest: Path, keep_last: int) -> None:
        """Remove all but the `keep_last` newest checkpoints.

        Pinned checkpoints and multiples of `keep_every` are not removed. Checkpoints of later updates than that of
        `newest` are damaged. They are neither removed nor counted.
        """
        candidates = [folder for folder in self.folders() if folder.name <= newest.name]
        for folder in candidates[:-keep_last]:
            update = int(folder.name.removeprefix("update_"))
            if (self.keep_every and update % self.keep_every == 0) or (folder / PINNED).exists():
                continue
            files.remove_folder(folder)


class PendingSave:
    """A save in progress, in three stages. All ranks exchange their outcomes after each stage.

    All ranks call `prepare`, `write_files`, `agree`, `publish` and `agree` in this order, until `done` is True.
    `write_files` and `publish` only do this rank's file work without communication, so they may run on a background
    thread. An error on any rank before the rename makes the save fail on every rank. An error after the rename is only
    reported as `problem`, because the checkpoint has already been published.

    Args:
        store: store in which the checkpoint is published.
        state: training state that the checkpoint contains.
        save_state: function that writes this rank's files through its argument.
        facts: values that the manifest records in addition to the state and the files.
    """

    def __init__(
        self, store: Store, state: TrainState, save_state: Callable[[WriteFile], None], facts: dict[str, Any]
    ) -> None:
        self.state = state
        self.folder = store.folder(state.update)
        self.done = False
        self.published = False
        self.problem = ""
        self._store = store
        self._save_state = save_state
        self._facts = facts
        self._partial = store.root / (_PARTIAL + self.folder.name)
        self._outcome = Outcome()
        self._complete: Checkpoint | None = None  # the checkpoint with the files of all ranks, after they are written

    def prepare(self) -> None:
        """Create the partial folder on rank 0. The save fails if there is not enough free space. Collective."""
        if self._store.rank.main:
            self._outcome = Outcome(_error_of(lambda: self._store.make_partial(self._partial)))
        self._exchange()

    def write_files(self) -> None:
        """Write and flush this rank's files."""
        recorder = _Recorder(self._partial)
        self._save_state(recorder)
        self._outcome = Outcome(recorder.error, recorder.written)

    def publish(self) -> None:
        """On rank 0, write the manifest, rename the partial folder, and remove old checkpoints."""
        if not self._store.rank.main:
            self._outcome = Outcome()
            return
        complete = self._complete
        assert complete is not None, "write_files and agree come first"
        error = _error_of(lambda: _seal(complete, self.folder))
        problem = "" if error else _error_of(lambda: self._store.retain(self.folder))
        self._outcome = Outcome(error, problem)

    def agree(self) -> None:
        """Exchange the outcome of the preceding `write_files` or `publish` with all ranks. Collective."""
        values = self._exchange()
        if self.done:
            return
        if self._complete is None:
            written = {name: file for part in values for name, file in part.items()}
            self._complete = Checkpoint(self._partial, self.state, {**self._facts, "files": written})
        else:
            self.done = True
            self.published = True
            self.problem = values[0]

    def _exchange(self) -> list[Any]:
        """Exchange outcomes, and return the value of every rank. An error on any rank ends the save."""
        error, values = self._store.gather_outcomes(self._outcome)
        if error:
            self.done = True
            self.problem = error
        return values


def read_manifest(folder: Path) -> tuple[Checkpoint | None, str]:
    """Read the manifest of a checkpoint, without checking the files that it lists.

    Returns:
        The checkpoint and "", or None and the reason why the manifest cannot be read.
    """
    try:
        first, _, rest = (folder / MANIFEST).read_bytes().partition(b",")
        if first != b'{"checksum": %d' % zlib.crc32(rest):
            return None, f"{MANIFEST} is damaged: its checksum differs"
        manifest = parse_json(b"{" + rest)
        for name, written in manifest["files"].items():
            files.WrittenFile(**written)
            if not isinstance(name, str) or {type(written["bytes"]), type(written["crc32"])} != {int}:
                raise ValueError(f"size or checksum of {name} is not a whole number")
        return Checkpoint(folder, TrainState(**manifest.pop("state")), manifest), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{MANIFEST} cannot be read ({error})"


def verify(folder: Path, part: int = 0, parts: int = 1) -> tuple[Checkpoint | None, str]:
    """Verify the files of a checkpoint against its manifest.

    Args:
        folder: the folder of the checkpoint.
        part: index of this process. It reads the files whose index is `part` modulo `parts`.
        parts: number of processes that share the reading. Each of them checks the presence and size of all files.

    Returns:
        The checkpoint and "", or None and a description of the first problem.
    """
    checkpoint, problem = read_manifest(folder)
    if checkpoint is None:
        return None, problem
    if problem := find_incomplete(checkpoint):
        return None, problem
    for index, (name, expected) in enumerate(checkpoint.facts["files"].items()):
        if index % parts == part:
            try:
                differs = files.crc32(folder / name) != expected["crc32"]
            except OSError as error:
                return None, f"{name} cannot be read ({_describe(error)})"
            if differs:
                return None, f"{name} is damaged: its checksum differs"
    return checkpoint, ""


def newest_valid(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest valid checkpoint of a run, like `Store.newest_valid`, in a single process."""
    return Store(run).newest_valid()


def find_incomplete(checkpoint: Checkpoint) -> str:
    """Return the first problem with the presence or size of a checkpoint's files, or "" if there is none."""
    for name, expected in checkpoint.facts["files"].items():
        path = checkpoint.folder / name
        if files.leads_out(path, checkpoint.folder):
            return f"{name} leads out of the checkpoint"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
    return ""


def _seal(complete: Checkpoint, final: Path) -> None:
    """Write the manifest with the files of all ranks, and rename the partial folder to its final name."""
    if problem := find_incomplete(complete):
        raise OSError(f"{problem} on rank 0's host: all ranks need the same run directory")
    for folder in {(complete.folder / name).parent for name in complete.facts["files"]}:
        files.sync(folder)
    body = json.dumps({"state": asdict(complete.state), **complete.facts}, indent=1)[1:] + "\n"
    files.write(complete.folder / MANIFEST, f'{{"checksum": {zlib.crc32(body.encode())},{body}'.encode())
    files.sync(complete.folder)
    files.remove_folder(final)  # the folder of a damaged checkpoint of the same update, if there is one
    files.rename(complete.folder, final)


class _Recorder:
    """Function object that writes the files of one rank, and records their sizes and checksums.

    It never raises OSError, because other ranks may be waiting in a collective of the same save. After the first error
    it writes no more files.
    """

    def __init__(self, folder: Path) -> None:
        self.error = ""
        self.written: dict[str, dict[str, int]] = {}
        self._folder = folder

    def __call__(self, name: str, data: bytes) -> None:
        self.error = self.error or _error_of(lambda: self._write(name, data))

    def _write(self, name: str, data: bytes) -> None:
        files.make_folder((self._folder / name).parent)
        self.written[name] = asdict(files.write(self._folder / name, data))


def _error_of(work: Callable[[], None]) -> str:
    """Run `work`, and return the message of the OSError that it raises, or "" on success."""
    try:
        work()
    except OSError as error:
        return _describe(error)
    return ""


def _describe(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}"
