"""One rank of a process group that saves while the disk of one rank fails: a line of JSON for each case."""

import errno
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch.distributed

from megagpt.checkpoint.store import Report, SaveFailed, Store
from megagpt.cluster import Agreement, Rank
from tests.protocol import Place, a_failing_call_harms_nothing
from tests.protocol import what_one_rank_cannot_write_is_published_by_none as one_part_fails


def alone(store: Store, report: Report) -> list:
    """The break: a rank waits for no other before it goes on."""
    problem, told = report
    if problem:
        raise SaveFailed(f"rank {store.rank.rank}: {problem}")
    return [told]


def said(kind: str, place: Place, on_rank: int, check: Callable[[], None]) -> None:
    """Make a check, and print what was wrong."""
    wrong = ""
    try:
        check()
    except AssertionError as error:
        wrong = f"AssertionError: {error}"
    case = {"kind": kind, "asynchronous": place.asynchronous, "on_rank": on_rank, "wrong": wrong}
    print(json.dumps(case), flush=True)
    place.agreement.barrier()


def main(folder: Path) -> None:
    """Every case, in the same order on all ranks."""
    torch.distributed.init_process_group("gloo")
    world = torch.distributed.get_world_size()
    rank, agreement = Rank(torch.distributed.get_rank(), world_size=world), Agreement(world)
    for asynchronous in (False, True):
        for on_rank in range(world):
            place = Place(folder / f"{asynchronous}-{on_rank}", asynchronous, rank, agreement)
            said("any call", place, on_rank, partial(a_failing_call_harms_nothing, place, errno.EIO, on_rank))
            for kind in ("one part", "no barrier"):
                run = place.folder / kind
                place.two_saved(run)
                with patch.object(Store, "_agree", alone) if kind == "no barrier" else nullcontext():
                    said(kind, place, on_rank, partial(one_part_fails, place, run, on_rank))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
