"""What one layout saved, any other goes on from: every later update and the weights equal plain PyTorch's."""

import json
from collections import defaultdict

import layouts
import move_worker
import pytest
import reference
from groups import SECONDS, launch
from safetensors.torch import load_file

from megagpt.parity.curve import TOLERANCES, seen

PAIRS = (
    ("zero1-2ranks", "zero3-4ranks"),
    ("zero3-4ranks", "zero0-1rank"),
    ("zero0-2ranks", "zero2-accumulate4-3ranks"),
    ("zero2-offload-2ranks", "zero1-1rank"),
    ("zero1-1rank", "zero3-offload-parameters-1rank"),
    ("zero3-offload-parameters-1rank", "zero2-2ranks"),
    ("zero3-2ranks", "pipeline2"),
    ("pipeline2-data2", "zero3-2ranks"),
    ("pipeline4", "pipeline2-data2"),
    ("pipeline2-tensor2", "zero2-offload-2ranks"),
    ("zero0-1rank", "pipeline2-tensor2"),
    ("tensor2-zero1", "zero1-4ranks"),
    ("zero3-4ranks", "tensor4"),
    ("ulysses2-zero3", "tensor2-zero2"),
    ("pipeline3", "zero3-persistent-2ranks"),
    ("tensor2-zero3", "pipeline2-tensor2"),
    ("tensor4", "ulysses2-zero1"),
    ("zero1-1rank", "zero1-1rank"),
)


@pytest.fixture(scope="module")
def after(request):
    return 96 if request.config.getoption("--full") else 12


@pytest.fixture(scope="module")
def moved(tmp_path_factory, after):
    """By pair what the second layout did; each world size runs once to save and once to load."""
    folder = tmp_path_factory.mktemp("moved")
    save, load, logs = defaultdict(set), defaultdict(list), {}
    for source, target in PAIRS:
        save[move_worker.case(source).world].add(source)
        load[move_worker.case(target).world].append((source, target))
    for world, ids in save.items():
        job = {"folder": str(folder), "after": after, "save": sorted(ids), "load": []}
        logs["save", world] = launch("move_worker.py", world, job, folder, SECONDS)
    for world, pairs in load.items():
        job = {"folder": str(folder), "after": after, "save": [], "load": pairs}
        logs["load", world] = launch("move_worker.py", world, job, folder, SECONDS)

    def answer(source, target):
        path = folder / f"{source}-to-{target}.json"
        if not path.exists():
            worlds = (("save", move_worker.case(source).world), ("load", move_worker.case(target).world))
            pytest.fail("\n".join(logs[world] for world in worlds), pytrace=False)
        return json.loads(path.read_text()), load_file(path.with_suffix(".weights"))

    return answer


@pytest.fixture(scope="module")
def plain(tmp_path_factory, after):
    """The uninterrupted curve, by plain PyTorch."""
    case = layouts.Case("reference", 1, {}, move_worker.RECIPE)
    recipe = layouts.recipe_of(case, tmp_path_factory.mktemp("reference"))
    size = layouts.GLOBAL_BATCH
    updates = [layouts.samples(recipe, size, n * size) for n in range(move_worker.BEFORE + after)]
    return recipe, reference.train(recipe, updates, move_worker.TOTAL, updates[0])


def test_the_reference_clips_in_some_updates_and_learns(plain):
    recipe, curve = plain
    later = curve.norms[move_worker.BEFORE :]
    assert min(later) < recipe.optimizer.clip < max(curve.norms)
    assert curve.losses[-1] < curve.losses[0] - 0.1


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name)
def test_another_layout_goes_on_as_if_nothing_had_happened(source, target, moved, plain):
    results, weights = moved(source, target)
    recipe, curve = plain
    tolerance = TOLERANCES["fp32"]
    before = move_worker.BEFORE
    expected = zip(curve.losses[before:], curve.norms[before:], curve.rates[before:], strict=True)
    for number, (result, (loss, norm, rate)) in enumerate(zip(results, expected, strict=True), start=before + 1):
        assert result["loss"] == pytest.approx(loss, rel=tolerance.loss), number
        assert result["grad_norm"] == pytest.approx(norm, rel=tolerance.norm), number
        assert result["lr"] == pytest.approx(rate, rel=1e-12), number
    for name, right in curve.weights.items():
        way = seen(recipe, name, right - curve.initial[name]).norm()
        assert seen(recipe, name, weights[name] - right).norm() <= tolerance.weights * way, name
