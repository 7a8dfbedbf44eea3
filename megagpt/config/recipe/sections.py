"""Sections and keys of a recipe, with type, range, unit and default.

The string under a key is its help text. "Off" and "none" are always written as null, never as -1 or 0. Rules between
keys are defined in rules.py, and presets in presets.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from megagpt.config.recipe.presets import PRESETS
from megagpt.config.syntax.locations import SourceLocations
from megagpt.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]

_Count = Annotated[int, Field(ge=1)]
_CountOrNone = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Text = Annotated[str, Field(min_length=1)]


def _float_to_int(value: Any) -> Any:
    """Convert a float without a fractional part to int, so that 300e9 tokens counts as a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _list_to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _lists_to_tuples(value: Any) -> Any:
    return tuple(map(_list_to_tuple, value)) if isinstance(value, list) else value


def _prefixes(value: Any) -> Any:
    """Convert a single prefix to a tuple with one element, and null to an empty tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _sources(value: Any) -> Any:
    """Convert each prefix, given alone or in a list, to a source of weight 1."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, (str, dict, Source)) for item in items):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class Section(BaseModel):
    """Base class of all sections. They are frozen and strictly typed, and reject unknown keys and infinite numbers."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


GATED_ACTIVATIONS = frozenset({"swiglu"})


class ModelSection(Section):
    """The model. After loading, every key has a value: the given one, the preset's, or a derived default."""

    preset: str | None = None
    """name of a published model shape; other keys of this section override it"""
    n_layer: _Count
    """number of transformer blocks"""
    n_head: _Count
    """number of attention heads"""
    n_kv_head: _Count = Field(default_factory=lambda given: given["n_head"])
    """number of key and value heads, each shared by a group of query heads; default: n_head"""
    d_model: _Count
    """width of the residual stream"""
    activation: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """activation function of the feed-forward layers; gelu is the tanh form, as in GPT-2"""
    d_ff: _Count = Field(default_factory=lambda given: default_d_ff(given["d_model"], given["activation"]))
    """hidden width of the feed-forward layers; default: 4·d_model (swiglu: 8/3·d_model, up to a multiple of 64)"""
    vocab_size: _Count
    """rows of the embedding matrix; at least the number of tokens of the tokenizer"""
    seq_len: _Count
    """context length in tokens; a sample has one token more, the last target"""
    position: Literal["learned", "rope"] = "learned"
    """learned absolute position embedding, or rotary (rope)"""
    rope_theta: _Positive = 10_000.0
    """base of the rotary wavelengths; used only with position: rope"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """layernorm gives all layers biases, as in GPT-2; rmsnorm gives none"""
    qk_norm: bool = False
    """normalize queries and keys of each head"""
    tie_embeddings: bool = True
    """use the embedding matrix as the output head"""
    dropout: _Fraction = 0.0
    """dropout probability; loss curves are equal on all layouts only at 0"""
    logit_softcap: _Positive | None = None
    """c in c·tanh(logits / c); null for no cap"""
    init: Literal["normal", "zero_projections"] = "normal"
    """initial weights: normal as in GPT-2; zero_projections makes each block start as the identity"""

    @property
    def is_gated(self) -> bool:
        """True if the activation is gated, so that the MLP has a third matrix, `gate`."""
        return self.activation in GATED_ACTIVATIONS

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        """Add the values of the preset for all keys that are not given."""
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset")
        return {**PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given


def default_d_ff(d_model: int, activation: str) -> int:
    """Return the default width of the MLP: 4·d_model, or for swiglu 8/3·d_model rounded up to a multiple of 64."""
    if activation not in GATED_ACTIVATIONS:
        return 4 * d_model
    return 64 * math.ceil(Fraction(8 * d_model, 3 * 64))


class Source(Section):
    """One source of the training data, if the data is a blend of several corpora."""

    path: _Text
    """prefix of a corpus: its path without .bin or .idx"""
    weight: _Positive = 1.0
    """weight relative to the other sources; data.weight_counts sets what it is proportional to"""
    max_epochs: _Positive | None = None
    """refuse to read the source more often than this in one run; null for no limit"""


class DataSection(Section):
    """Training and validation data. A prefix is the path of a corpus without .bin or .idx."""

    tokenizer: _Text | None = None
    """a sentencepiece .model, a tokenizer.json, or the name of a tiktoken encoding; null if not needed"""
    train: Annotated[tuple[Source, ...], BeforeValidator(_sources)]
    """a prefix, or a list of {path, weight}"""
    weight_counts: Literal["samples", "epochs"] = "samples"
    """what weights are proportional to: samples taken from a source, or epochs over it"""
    validation: Annotated[tuple[_Text, ...], BeforeValidator(_prefixes)] = ()
    """a prefix, or a list of prefixes with a separate loss for each; null for no validation"""
    document_mask: bool = False
    """mask attention at document boundaries, and restart position ids there"""
    eod: _CountOrNone | None = None
    """token id that ends a document; null to read it from the corpora"""
    skip: Annotated[tuple[tuple[_CountOrNone, _CountOrNone], ...], BeforeValidator(_lists_to_tuples)] = ()
    """ranges of data positions to skip, a list of [first, last]; other positions keep their samples"""


class BatchSection(Section):
    """Batch size."""

    global_size: _Count
    """samples per update, over all ranks"""


class OptimizerSection(Section):
    """Optimizer and its settings."""

    type: Literal["adamw", "muon"] = "adamw"
    """muon updates the matrices of the blocks, and AdamW all other parameters"""
    lr: _Positive
    """peak learning rate of AdamW; with muon, that of embeddings, head and norms"""
    betas: Annotated[tuple[_Fraction, _Fraction], BeforeValidator(_list_to_tuple)] = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    eps: _Positive = 1.0e-8
    """term added to AdamW's denominator"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """decoupled weight decay, multiplied by the learning rate; applies to matrices only"""
    clip: _Positive | None = 1.0
    """maximum norm of the whole gradient; null for no clipping"""
    muon_lr: _Positive | None = None
    """peak learning rate of the matrices of the blocks; muon only"""
    muon_momentum: _Fraction | None = Field(default_factory=lambda given: 0.95 if given["type"] == "muon" else None)
    """momentum; muon only, default: 0.95"""


class ScheduleSection(Section):
    """Learning rate schedule: linear warm-up to the peak, then decay to min_lr."""

    type: Literal["warmup_decay", "warmup_cosine", "wsd"] = "warmup_decay"
    """linear decay, cosine decay, or constant with a linear decay at the end (wsd)"""
    warmup_updates: _CountOrNone
    """updates of the warm-up; update n uses peak·n/warmup_updates; 0 starts at the peak"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """learning rate at the end of training"""
    decay_updates: _Count | None = None
    """updates of the decay at the end; wsd only"""


class LengthSection(Section):
    """Length of training. Exactly one of the three keys must be set."""

    updates: _Count | None = None
    """number of updates"""
    tokens: Annotated[int, Field(ge=1), BeforeValidator(_float_to_int)] | None = None
    """number of tokens, rounded up to whole updates"""
    epochs: _Positive | None = None
    """passes over the training data, rounded up to whole updates"""


class EvaluationSection(Section):
    """Validation during training."""

    every: _Count | None = None
    """updates between validations; null for no validation"""
    samples: _Count | None = None
    """sequences per validation; null for all of data.validation"""
    prompt: str | None = None
    """text that the model continues at each validation; null for none"""


class CheckpointSection(Section):
    """Checkpoints and how many of them are kept."""

    every: _Count | None = 1000
    """updates between checkpoints; null for one checkpoint at the end"""
    keep_last: _Count | None = 3
    """number of most recent checkpoints to keep; null for all"""
    keep_every: _Count | None = None
    """updates between checkpoints that are never deleted; null for none"""
    asynchronous: bool = False
    """write checkpoints while training continues; needs host memory for the weights and moments of each rank"""


class HealthSection(Section):
    """Reactions to bad losses and gradients. Values that are not finite always count as bad.

    Spikes are measured in robust standard deviations: 1.48 × the median absolute deviation.
    """

    loss_spike: _Positive | None = None
    """skip an update if its loss is this many deviations above the median of recent losses; null for never"""
    norm_spike: _Positive | None = None
    """roll back to a checkpoint if the gradient norm is this many deviations above the median; null for never"""
    window: Annotated[int, Field(ge=8)] = 128
    """number of recent updates to compare with; no spike is detected during the first ones"""
    skips: _CountOrNone = 3
    """consecutive updates that may be skipped; one more rolls back to a checkpoint"""
    compare_every: _Count | None = None
    """updates between checks that replicated weights are equal on all ranks; null for none"""


class LogSection(Section):
    """Console output and hang detection. metrics.jsonl records every update, independently of the console."""

    every: _Count = 10
    """updates between lines on the console"""
    hang_after: _Positive = 60.0
    """exit after this many seconds without progress, or 5 times the median update if that is longer"""


class Recipe(Section):
    """Everything that determines what is trained. The DeepSpeed config determines how training is distributed."""

    run_dir: _Text
    """directory that the run writes to and resumes from"""
    init_from: _Text | None = None
    """RUN@UPDATE or RUN@latest: start from that checkpoint, with a new schedule and length; null: start from scratch"""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """random seed of the initial weights, the data order and dropout"""
    precision: Precision | None = None
    """precision of weights and activations in training; null: as the DeepSpeed config states, else fp32"""
    model: ModelSection
    data: DataSection
    batch: BatchSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    length: LengthSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    health: HealthSection = HealthSection()
    log: LogSection = LogSection()

    _locations: SourceLocations = PrivateAttr(default_factory=SourceLocations)

    @property
    def document_end(self) -> int | None:
        """Id of the end-of-document token at which attention is masked, or None if attention is not masked.

        Raises UserError if `data.document_mask` is true and `data.eod` is not known.
        """
        if self.data.document_mask and self.data.eod is None:
            where = f"{self.location('data.document_mask')}  data.document_mask".strip()
            raise UserError("data.document_mask needs the id of the token that ends a document", where, "give data.eod")
        return self.data.eod if self.data.document_mask else None

    def location(self, key: str) -> str:
        """Return the location at which a dotted key was given: `FILE:LINE`, "command line", or "" for a default."""
        location = self._locations.by_key.get(key)
        return location.at if location else ""
