"""Layouts that split the model resume bit for bit from a save, and evaluations in between change nothing."""

import pytest

from tests.parity import layouts
from tests.parity.groups import answers_of

IDS = (
    "pipeline2",
    "pipeline2-bf16",
    "tensor2-zero2",
    "ulysses2-zero3",
    "pipeline3",
    "pipeline4-llama",
    "pipeline2-data2",
    "pipeline2-tensor2",
    "pipeline2-tensor2-muon",
    "tensor2-zero3-muon",
    "tensor2-zero1-llama-data2",
    "ulysses2-tensor2",
    "ulysses2-zero2-llama-data2",
    "stages-EPBBN-H-muon-offload-bf16",
    "stages-E-PBB-BBN-H-offload",
)
CASES = [case for case in layouts.CASES if case.id in IDS]
TIED = [case for case in CASES if "pipeline" in case.config and "model.tie_embeddings=false" not in case.recipe]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Results by case."""
    return answers_of("state_worker", CASES, tmp_path_factory.mktemp("state"))


def test_every_named_case_is_there():
    assert len(CASES) == len(IDS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_loaded_engine_resumes_bit_for_bit_despite_evaluations(case, answers):
    answer = answers(case)
    assert answer["same results"]
    assert answer["same weights"]


@pytest.mark.parametrize("case", TIED, ids=lambda case: case.id)
def test_the_copies_of_a_tied_matrix_stay_equal(case, answers):
    answer = answers(case)
    assert answer["tied matrices"] == 2 * case.world // case.config["pipeline"]["stages"]
    assert answer["tied matrices are equal"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_evaluation_accepts_any_number_of_batches_and_a_smaller_last_one(case, answers):
    answer = answers(case)
    bound = (
        1e-3 if "precision=bf16" in case.recipe else 1e-6
    )  # bf16 rounds the weights, which are fp32 in the reference
    assert answer["evaluation"] == pytest.approx(answer["evaluation expected"], rel=bound)
