"""Updates with bad numbers are skipped on every layout, and leave the state as if their data did not exist."""

import math

import pytest

from megagpt.parity.curve import TOLERANCES
from tests.parity import layouts
from tests.parity.groups import answers_of
from tests.parity.skip_worker import BAD

IDS = (
    *(f"zero{stage}-accumulate4-3ranks" for stage in range(4)),
    *(f"zero{stage}-offload-2ranks" for stage in (1, 2, 3)),
    "zero0-1rank",
    "zero0-muon-2ranks",
    "zero1-muon-bf16-2ranks",
    "zero2-muon-fp16-2ranks",
    "zero3-muon-offload-parameters-2ranks",
    "pipeline2-tensor2-muon",
    "zero3-offload-parameters-1rank",
    "zero3-persistent-2ranks",
    "zero3-hpz2-4ranks",
    *(f"zero{stage}-{precision}-2ranks" for stage in (1, 2, 3) for precision in ("bf16", "fp16")),
    "zero2-bf16-offload-2ranks",
    "pipeline2",
    "pipeline2-offload",
    "pipeline2-bf16",
    "pipeline2-fp16-untied",
    "pipeline2-data2-recompute-2of4-host",
    "pipeline2-tensor2-bf16",
    "pipeline2-tensor2-fp16-llama",
    "tensor2-zero0",
    "tensor2-bf16",
    "tensor2-zero3",
    "tensor2-bf16-zero2-data2",
    "ulysses2-zero1",
    "ulysses2-zero3-bf16",
    "ulysses2-tensor2",
    "ulysses2-pipeline2-llama",
    "stages-EPBBN-H-muon-offload-bf16",
    "stages-EPBB-NH-data2-fp16",
)
CASES = [case for case in layouts.CASES if case.id in IDS]
# Cases in which no other rank has a copy of the last rank's weights: a single rank, or an untied head.
ALONE = ("zero0-1rank", "pipeline2-fp16-untied", "pipeline2-tensor2-fp16-llama", "ulysses2-pipeline2-llama")
FP16 = [case for case in CASES if "precision=fp16" in case.recipe]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Results by case."""
    return answers_of("skip_worker", CASES, tmp_path_factory.mktemp("skips"))


def test_every_named_case_is_there():
    assert len(CASES) == len(IDS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_updates_leave_no_trace(case, answers):
    answer = answers(case)
    assert answer["made"] == dict.fromkeys(BAD, False)
    assert answer["same results"]
    assert answer["same weights"]
    if case in FP16:
        assert (
            answer["hysteresis"] == 1
        )  # initially 2; only an infinite gradient with a good loss counts against the loss scale


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_each_loss_is_judged_once_and_reported_by_every_rank(case, answers):
    for kind, ranks in answers(case)["reported"].items():
        stages = case.config.get("pipeline", {}).get("stages", 1)
        judges = ranks[-len(ranks) // stages :]  # in a pipeline, the ranks of the last stage
        assert all(rank["order"] == ["accept", "step"] for rank in judges)
        assert all(rank["order"] == ["step"] for rank in ranks[: len(ranks) - len(judges)])
        (loss,) = {value for rank in ranks for value in [rank["loss"], *rank["losses"]]}
        assert math.isfinite(float(loss)) == (kind != "a loss that is NaN on one rank")


@pytest.mark.parametrize("case", FP16, ids=lambda case: case.id)
def test_initial_overflows_do_not_change_the_curve(case, answers):
    answer = answers(case)
    assert answer["overflows"] > 3
    assert answer["rates"]
    assert answer["off"] <= TOLERANCES["fp16"].loss


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_nan_weights_are_restored_from_a_checkpoint(case, answers):
    answer = answers(case)
    assert not answer["broken"]
    assert answer["healed"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_one_flipped_bit_is_found_in_replicated_weights(case, answers):
    answer = answers(case)
    assert answer["false alarms"] == []
    if case.id in ALONE or case.config["zero_optimization"]["stage"] == 3:
        return
    (line,) = answer["differ"]
    assert line.startswith(answer["flipped"])
    assert line.endswith(f"rank {case.world - 1}")
