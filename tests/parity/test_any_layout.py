"""Any layout can resume from any other's checkpoint: all later updates and the weights match plain PyTorch."""

import json
from collections import defaultdict
from functools import lru_cache

import pytest
from safetensors.torch import load_file

from megagpt.parity.curve import tolerance_of, without_key_bias
from tests.parity import layouts, move_worker, reference
from tests.parity.groups import SECONDS, launch
from tests.parity.needs import missing

MOVES = (
    ("zero1-2ranks", "zero3-4ranks", "fp32"),
    ("zero3-4ranks", "zero0-1rank", "fp32"),
    ("zero0-2ranks", "zero2-accumulate4-3ranks", "fp32"),
    ("zero2-offload-2ranks", "zero1-1rank", "fp32"),
    ("zero1-1rank", "zero3-offload-parameters-1rank", "fp32"),
    ("zero3-offload-parameters-1rank", "zero2-2ranks", "fp32"),
    ("zero3-2ranks", "pipeline2", "fp32"),
    ("pipeline2-data2", "zero3-2ranks", "fp32"),
    ("pipeline4", "pipeline2-data2", "fp32"),
    ("pipeline2-tensor2", "zero2-offload-2ranks", "fp32"),
    ("zero0-1rank", "pipeline2-tensor2", "fp32"),
    ("tensor2-zero1", "zero1-4ranks", "fp32"),
    ("zero3-4ranks", "tensor4", "fp32"),
    ("ulysses2-zero3", "tensor2-zero2", "fp32"),
    ("pipeline3", "zero3-persistent-2ranks", "fp32"),
    ("tensor2-zero3", "pipeline2-tensor2", "fp32"),
    ("tensor4", "ulysses2-zero1", "fp32"),
    ("zero1-1rank", "zero1-1rank", "fp32"),
    ("zero3-nvme-2ranks", "zero1-1rank", "fp32"),
    ("zero3-2ranks", "zero3-nvme-2ranks", "fp32"),
    ("zero1-1rank", "zero3-2ranks", "bf16"),
    ("zero3-4ranks", "pipeline2", "bf16"),
    ("pipeline2-data2", "zero2-offload-2ranks", "bf16"),
    ("zero1-1rank", "zero3-4ranks", "fp16"),
    ("zero3-2ranks", "pipeline2", "fp16"),
    ("pipeline2-data2", "zero2-2ranks", "fp16"),
    ("zero1-4ranks", "zero0-1rank", "muon"),
    ("zero0-1rank", "zero3-4ranks", "muon"),
    ("zero3-2ranks", "pipeline2-data2", "muon"),
    ("pipeline2-tensor2", "zero2-offload-2ranks", "muon"),
    ("zero0-4ranks", "tensor2-zero2", "muon"),
    ("zero3-nvme-2ranks", "zero0-2ranks", "muon"),
)
HALF = ("bf16", "fp16")


@pytest.fixture(scope="module")
def after(request):
    """Number of updates after a move, by kind: few with fp16, whose loss scale grows until gradients overflow."""
    full = request.config.getoption("--full")
    return {kind: 100 if full and kind != "fp16" else 8 for kind in move_worker.RECIPES}


@pytest.fixture(scope="module")
def possible():
    """Moves that this machine can make, and by move the reason why not, or None."""
    reasons = {
        (source, target, kind): next(
            (reason for name in (source, target) if (reason := missing(move_worker.case(name, kind)))), None
        )
        for source, target, kind in MOVES
    }
    return [move for move, reason in reasons.items() if reason is None], reasons


@pytest.fixture(scope="module")
def moved(tmp_path_factory, after, possible):
    """Run all moves, once per world size to save and once to load. Returns the results of a move."""
    folder = tmp_path_factory.mktemp("moved")
    save, load, logs = defaultdict(set), defaultdict(list), {}
    for source, target, kind in possible[0]:
        save[move_worker.case(source, kind).world].add((source, kind))
        load[move_worker.case(target, kind).world].append((source, target, kind))
    for source, kind in sorted({(source, kind) for source, _, kind in possible[0] if kind in HALF}):
        load[move_worker.case(source, kind).world].append(("nowhere", source, kind))
    for world, sources in save.items():
        job = {"folder": str(folder), "after": after, "save": sorted(sources), "load": []}
        logs["save", world] = launch("move_worker", world, job, folder, SECONDS * len(sources))
    for world, moves in load.items():
        job = {"folder": str(folder), "after": after, "save": [], "load": moves}
        logs["load", world] = launch("move_worker", world, job, folder, SECONDS * len(moves))

    def answer(source, target, kind):
        if reason := possible[1][source, target, kind]:
            pytest.skip(reason)
        path = folder / f"{source}-{kind}-to-{target}.json"
        if not path.exists():
            worlds = (("save", move_worker.case(source, kind).world), ("load", move_worker.case(target, kind).world))
            pytest.fail("\n".join(logs[world] for world in worlds), pytrace=False)
        # In half precision, tensors with small gradients differ from plain PyTorch by more than a move may change them.
        # They are therefore compared with the same layout without a move.
        right = load_file(folder / f"nowhere-{kind}-to-{source}.weights") if kind in HALF else None
        return json.loads(path.read_text()), load_file(path.with_suffix(".weights")), right

    return answer


@pytest.fixture(scope="module")
def plain(tmp_path_factory, after):
    """Uninterrupted curve of plain PyTorch, by kind."""
    folder = tmp_path_factory.mktemp("reference")

    @lru_cache
    def of(kind):
        recipe = layouts.recipe_of(layouts.Case("reference", 1, {}, move_worker.RECIPES[kind]), folder)
        size = layouts.GLOBAL_BATCH
        updates = [layouts.samples(recipe, size, n * size) for n in range(move_worker.BEFORE + after[kind])]
        return recipe, reference.train(recipe, updates, move_worker.TOTAL, updates[0])

    return of


@pytest.mark.parametrize("kind", move_worker.RECIPES)
def test_the_reference_clips_in_some_updates_and_learns(plain, kind):
    recipe, curve = plain(kind)
    later = curve.norms[move_worker.BEFORE :]
    assert min(later) < recipe.optimizer.clip < max(curve.norms)
    assert curve.losses[-1] < curve.losses[0] - 0.1


@pytest.mark.parametrize(("source", "target", "kind"), MOVES, ids=lambda name: name)
def test_another_layout_resumes_the_same_curve(source, target, kind, moved, plain):
    results, weights, unmoved = moved(source, target, kind)
    recipe, curve = plain(kind)
    tolerance = tolerance_of(recipe)
    before = move_worker.BEFORE
    expected = zip(curve.losses[before:], curve.norms[before:], curve.rates[before:], strict=True)
    for number, (result, (loss, norm, rate)) in enumerate(zip(results, expected, strict=True), start=before + 1):
        assert result["loss"] == pytest.approx(loss, rel=tolerance.loss), number
        assert result["grad_norm"] == pytest.approx(norm, rel=tolerance.norm), number
        assert result["lr"] == pytest.approx(rate, rel=1e-12), number
        if kind == "fp16":
            doubled = (number - 1) // move_worker.WINDOW  # counts the updates before the save, too
            assert result["scale"] == 2.0 ** (move_worker.SCALE + doubled), number
    for name, right in (unmoved or curve.weights).items():
        moved_by = without_key_bias(recipe, name, right - curve.initial[name]).norm()
        assert without_key_bias(recipe, name, weights[name] - right).norm() <= tolerance.weights * moved_by, name
