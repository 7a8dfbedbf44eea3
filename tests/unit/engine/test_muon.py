"""Muon compared with its definition by singular value decomposition, and with AdamW for other parameters."""

import pytest
import torch

from megagpt.engine.optim.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (32, 32), (32, 40)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_lose_their_singular_values(shape):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ result @ v.mT  # diagonal in the basis of the input's singular vectors
    diagonal = torch.diagonal(inside, dim1=1, dim2=2)
    assert torch.allclose(inside, torch.diag_embed(diagonal), atol=1e-4)
    assert diagonal.min() > 0.3  # the reference's coefficients end between about 0.3 and 1.3 for small values
    assert diagonal.max() < 1.3


def test_wide_matrices_are_orthogonalized_as_by_the_iteration_of_its_authors():
    """The reference runs in double precision."""
    matrix = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(5))
    expected = matrix.double() / matrix.double().flatten(1).norm(dim=1)[:, None, None]
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    assert torch.allclose(orthogonalize(matrix).double(), expected, atol=2e-5)


def test_matrices_of_a_batch_do_not_affect_each_other():
    matrices = torch.randn(4, 8, 24, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([orthogonalize(one[None]) for one in matrices])
    assert torch.allclose(orthogonalize(matrices), alone, atol=1e-5)


def test_a_fused_matrix_is_orthogonalized_in_its_parts():
    torch.manual_seed(3)
    whole = torch.nn.Parameter(torch.zeros(24, 8))
    parts = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    whole.grad = torch.randn(24, 8)
    for part, gradient in zip(parts, whole.grad.split(8), strict=True):
        part.grad = gradient.clone()
    group = {"lr": 0.1, "muon": True}
    rest = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.1}
    Muon([rest, {"params": [whole], "parts": 3, **group}], 0.95).step()
    Muon([rest, {"params": parts, "parts": 1, **group}], 0.95).step()
    assert whole.abs().max() > 0
    assert torch.allclose(whole, torch.cat(parts), atol=1e-6)


def test_other_groups_are_trained_as_torch_adamw_trains_them():
    torch.manual_seed(4)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    matrix = torch.nn.Parameter(torch.eye(5))
    adamw = {"betas": (0.9, 0.95), "eps": 1e-8}
    mine = Muon(
        [
            {"params": [ours], "lr": 0.01, "weight_decay": 0.1},
            {"params": [matrix], "lr": 0.02, "parts": 1, "muon": True},
        ],
        0.95,
        **adamw,
    )
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1, **adamw)
    for step in range(5):
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.01 / (step + 1)  # as a schedule does
        ours.grad = torch.randn(5)
        theirs.grad, matrix.grad = ours.grad.clone(), torch.randn(5, 5)
        mine.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_a_restored_optimizer_continues_bit_for_bit():
    def build():
        parameters = [torch.nn.Parameter(torch.eye(6)), torch.nn.Parameter(torch.ones(6))]
        groups = [
            {"params": parameters[1:], "lr": 0.01},
            {"params": parameters[:1], "lr": 0.02, "parts": 1, "muon": True},
        ]
        return parameters, Muon(groups, 0.95, fused=True)

    def train(parameters, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    straight, optimizer = build()
    train(straight, optimizer, range(6))
    first, saved = build()
    train(first, saved, range(3))
    second, restored = build()
    with torch.no_grad():
        for parameter, value in zip(second, first, strict=True):
            parameter.copy_(value)
    restored.load_state_dict(saved.state_dict())
    train(second, restored, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
