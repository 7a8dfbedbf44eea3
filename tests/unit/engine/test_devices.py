"""Which device a rank takes, and what is rejected, on machines that are described by arguments."""

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megagpt.engine import devices
from megagpt.errors import MachineError

ONE = {"CUDA_VISIBLE_DEVICES": "5"}


@pytest.mark.parametrize(
    ("env", "local_rank", "visible", "index"),
    [({}, 0, 1, 0), ({}, 3, 8, 3), (ONE, 3, 1, 0), ({"ROCR_VISIBLE_DEVICES": "2"}, 7, 1, 0), (ONE, 1, 2, 1)],
)
def test_each_rank_has_a_device_of_its_own(env, local_rank, visible, index):
    assert devices.device_index(env, local_rank, visible) == index


@pytest.mark.parametrize(("local_rank", "visible"), [(1, 1), (8, 8), (0, 0)])
def test_a_rank_without_a_device_is_an_error(local_rank, visible):
    with pytest.raises(MachineError) as caught:
        devices.device_index({}, local_rank, visible)
    assert str(caught.value) == (
        f"megagpt: local rank {local_rank} has no device of its own: it sees {visible}\n"
        "  CUDA_VISIBLE_DEVICES, the slots of the hostfile, or the number of ranks given to the launcher\n"
        "  do: start as many ranks on each host as it has devices"
    )


def test_deepspeed_reads_the_same_device_from_every_variable():
    assert devices.device_env({"LOCAL_RANK": "3"}, 0) == {"LOCAL_RANK": "0"}
    both = {"LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert devices.device_env({"OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 0) == both


@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({}, 12),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 12),  # torchrun's default
        ({"SLURM_CPUS_PER_TASK": "7"}, 7),
    ],
)
def test_the_ranks_of_a_host_share_its_cores(env, threads):
    assert devices.host_threads(env, 96, 8) == threads
    assert devices.host_threads({}, 2, 8) == 1


def test_gpus_that_torch_does_not_see_are_an_error(tmp_path):
    devices.check_unused_gpus({}, tmp_path)
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    with pytest.raises(
        MachineError, match=f"this host has 2 NVIDIA GPUs, but torch {torch.__version__}".replace("+", r"\+")
    ):
        devices.check_unused_gpus({}, tmp_path)
    for env in ({"DS_ACCELERATOR": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}):
        devices.check_unused_gpus(env, tmp_path)


@pytest.mark.parametrize(
    ("capability", "hip", "supported"), [((7, 5), None, False), ((8, 0), None, True), ((7, 0), "6", True)]
)
def test_emulated_bf16_is_not_supported(monkeypatch, capability, hip, supported):
    monkeypatch.setattr(type(get_accelerator()), "device_name", lambda *_: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert devices.supports_precision("bf16") == supported
    assert devices.supports_precision("fp32")
