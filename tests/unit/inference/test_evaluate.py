"""Evaluation, baselines, generation and the report, on a tiny model whose results can be computed in other ways."""

import json
import lzma
import math
from collections import Counter

import pytest
import torch

from megagpt import cli, report
from megagpt.checkpoint import store as checkpoint
from megagpt.checkpoint import weights
from megagpt.checkpoint.async_saver import Saver
from megagpt.config import recipe
from megagpt.corpus.reader import CorpusReader
from megagpt.errors import UserError, without_controls
from megagpt.inference import baselines, evaluate, generate
from megagpt.model.gpt import GPT, initialize
from megagpt.prepare.command import PrepareOptions, prepare_command, train_tokenizer_command
from megagpt.state import TrainState
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.training.metrics import Metrics
from tests import training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Create a run directory with the initial weights of a model, without the training code."""
    folder = tmp_path_factory.mktemp("evaluate")
    text = folder / "text"
    text.mkdir()
    inputs = [str(training.write_text(text))]
    train_tokenizer_command(inputs, 300, folder / "text")
    prepare_command(inputs, folder / "text.model", folder / "text", PrepareOptions(0.3))
    path = folder / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(training.write_recipe(path, folder).read_text())
    model = GPT(recipe.load(path / "recipe.yaml").model)
    initialize(model, 1)
    store = checkpoint.Store(path)
    Saver(store, lambda sink: weights.save(model.named_parameters(), sink), {}, False).save(TrainState(12, 48, 1536))
    metrics = Metrics(path, True, window=1)
    metrics.truncate(0)
    for update in range(1, 13):
        metrics.write("update", update=update, loss=6.0 / update, tokens=128 * update)
    metrics.write("validation", update=12, loss=0.75)
    metrics.close()
    return path


def whole_loss(run, tokens, eod):
    """Return nats per token over all tokens, in windows of 32, each predicted from the earlier ones in its window."""
    model = GPT(recipe.load(run / "recipe.yaml").model)
    initialize(model, 1)
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens), 32):
            labels = torch.tensor(tokens[start : start + 32])
            before = torch.tensor([tokens[start - 1] if start else eod, *tokens[start : start + 31]])[: len(labels)]
            total += float(torch.nn.functional.cross_entropy(model(before[None]).logits[0], labels, reduction="sum"))
    return total / len(tokens)


def test_loss_is_over_all_tokens_and_bits_over_all_bytes(run):
    result = evaluate.evaluate(run)
    corpus = CorpusReader(run.parent / "text.validation")
    tokens = corpus.tokens.tolist()
    texts = [Tokenizer(run.parent / "text.model").decode(corpus.document(n).tolist()) for n in range(len(corpus))]
    assert result.tokens == len(tokens)
    assert result.loss == pytest.approx(whole_loss(run, tokens, 1), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    size = sum(len(text.encode()) for text in texts)
    assert result.bits_per_byte == pytest.approx(result.loss * len(tokens) / math.log(2) / size)
    assert result.update == 12


def test_a_text_file_can_be_evaluated(run, tmp_path):
    file = tmp_path / "new.txt"
    file.write_text("the of and that\nis was for on with\n" * 20)
    result = evaluate.evaluate(run, str(file))
    tokenizer = Tokenizer(run.parent / "text.model")
    tokens = [*tokenizer.encode(file.read_text()), tokenizer.eod]
    assert result.loss == pytest.approx(whole_loss(run, tokens, tokenizer.eod), rel=1e-5)


def test_baselines_match_independent_computations(run):
    train, validation = (CorpusReader(run.parent / f"text.{part}") for part in ("train", "validation"))
    tokenizer = Tokenizer(run.parent / "text.model")
    measured = baselines.measure_baselines(train, validation, tokenizer)
    training_text, text = (
        b"".join(tokenizer.decode(corpus.document(n).tolist()).encode() for n in range(len(corpus)))
        for corpus in (train, validation)
    )

    def size(data):
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    assert measured.xz == pytest.approx(8 * size(text) / len(text))
    assert measured.xz_after_training == pytest.approx(
        8 * (size(training_text + text) - size(training_text)) / len(text)
    )
    seen, wanted = Counter(train.tokens.tolist()), validation.tokens.tolist()
    vocabulary = max(*seen, *wanted) + 1
    bits = sum(-math.log2((seen[token] + 1) / (len(train.tokens) + vocabulary)) for token in wanted)
    assert measured.unigram == pytest.approx(bits / len(text))


def test_the_baseline_table_is_sorted_and_json_is_printed(run, capsys):
    assert cli.main(["evaluate", str(run), "--yardsticks"]) == 0
    table = capsys.readouterr().out.split("(lower is better):\n")[1].splitlines()
    figures = [float(line.split()[-1]) for line in table]
    assert len(figures) == 4
    assert figures == sorted(figures)
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["update"] == 12


def test_generation_depends_on_the_seed_and_follows_the_prompt(run, capsys):
    first, again, other = (generate.generate(run, "the of", 12, 1.0, None, None, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.continuation != other.continuation
    assert (
        cli.main(["generate", str(run), "--prompt", "the of", "--tokens", "12", "--temperature", "1", "--seed", "1"])
        == 0
    )
    assert capsys.readouterr().out == f"{without_controls(first.prompt + first.continuation)}\n"


def test_the_report_matches_the_recorded_metrics(run, capsys):
    curve = report.read_curve(run)
    assert curve.loss == [6.0 / update for update in range(1, 13)]
    assert curve.tokens == [128 * update for update in range(1, 13)]
    assert (curve.validation_tokens, curve.validation_loss) == ([1536], [0.75])
    assert cli.main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "loss, nats per token" in printed
    assert "\x1b" not in printed  # no colours into a pipe
    picture = (run / "loss.svg").read_text()
    assert "<svg" in picture


MISTAKES = {
    "no run": (
        ["evaluate", "{empty}"],
        "megagpt: there is no trained model here\n  {empty}/checkpoints holds no checkpoint\n",
    ),
    "no record": (
        ["report", "{empty}"],
        "megagpt: there is nothing to report\n  {empty}/metrics.jsonl does not exist\n",
    ),
    "no such data": (
        ["evaluate", "{run}", "--data", "nowhere"],
        "megagpt: cannot open the corpus: No such file or directory\n",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported_without_a_traceback_and_exit_2(run, tmp_path, capsys, mistake):
    arguments, message = MISTAKES[mistake]
    assert cli.main([argument.format(empty=tmp_path, run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message.format(empty=tmp_path, run=run))
    assert "\n  do: " in error


def test_a_damaged_checkpoint_is_not_evaluated(run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = next(copy.glob("checkpoints/update_*/state/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="there is no trained model here"):
        evaluate.evaluate(copy)
