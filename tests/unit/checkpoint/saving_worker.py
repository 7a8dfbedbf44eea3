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

from megagpt.checkpoint.store import Outcome, Store
from megagpt.cluster import Collectives, Rank
from tests.protocol import Place, a_failing_call_harms_nothing
from tests.protocol import what_one_rank_cannot_write_is_published_by_none as one_part_fails


def without_other_ranks(store: Store, outcome: Outcome) -> tuple[str, list]:
    """Plant a bug: a rank does not wait for the others, and does not learn of their errors."""
    return f"rank {store.rank.rank}: {outcome.error}" if outcome.error else "", [outcome.value]


def said(kind: str, place: Place, on_rank: int, check: Callable[[], None]) -> None:
    """Make a check, and print what was wrong."""
    wrong = ""
    try:
        check()
    except AssertionError as error:
        wrong = f"AssertionError: {error}"
    case = {"kind": kind, "asynchronous": place.asynchronous, "on_rank": on_rank, "wrong": wrong}
    print(json.dumps(case), flush=True)
    place.collectives.barrier()


def main(folder: Path) -> None:
    """Every case, in the same order on all ranks."""
    torch.distributed.init_process_group("gloo")
    world = torch.distributed.get_world_size()
    rank, collectives = Rank(torch.distributed.get_rank(), world_size=world), Collectives(world)
    for asynchronous in (False, True):
        for on_rank in range(world):
            place = Place(folder / f"{asynchronous}-{on_rank}", asynchronous, rank, collectives)
            said("any call", place, on_rank, partial(a_failing_call_harms_nothing, place, errno.EIO, on_rank))
            for kind in ("one part", "no barrier"):
                run = place.folder / kind
                place.two_saved(run)
                with (
                    patch.object(Store, "gather_outcomes", without_other_ranks)
                    if kind == "no barrier"
                    else nullcontext()
                ):
                    said(kind, place, on_rank, partial(one_part_fails, place, run, on_rank))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
