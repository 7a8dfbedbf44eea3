"""Every section and key of a recipe: its type, range, unit and default.

The line under a key is its help text. null means "off" or "none", never -1 or 0.
Cross-field rules are in rules.py, presets in presets.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from megagpt.errors import UserError
from megagpt.recipe.places import Places
from megagpt.recipe.presets import PRESETS

Precision = Literal["fp32", "bf16", "fp16"]

_Count = Annotated[int, Field(ge=1)]
_CountOrNone = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Text = Annotated[str, Field(min_length=1)]


def _whole(value: Any) -> Any:
    """300e9 tokens is a whole number, though YAML reads it as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pairs(value: Any) -> Any:
    return tuple(map(_pair, value)) if isinstance(value, list) else value


def _prefixes(value: Any) -> Any:
    """Let a bare PREFIX stand for a list of one, and null for an empty list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str) else value


def _sources(value: Any) -> Any:
    """Let a bare PREFIX stand for a source of weight 1, alone or in a list."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(item, (str, dict, Source)) for item in items):
        return value
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


class Section(BaseModel):
    """What all sections share: frozen, strict types, no unknown keys, no infinities."""

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
    """The model. After loading every key is filled: by hand, from the preset, or derived."""

    preset: str | None = None
    """name of a published shape; keys given beside it override it"""
    n_layer: _Count
    """transformer blocks"""
    n_head: _Count
    """attention heads"""
    n_kv_head: _Count = Field(default_factory=lambda given: given["n_head"])
    """key and value heads, shared by groups of query heads; n_head unless given"""
    d_model: _Count
    """width of the residual stream"""
    activation: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """of the feed-forward part; gelu is the tanh form, as in GPT-2"""
    d_ff: _Count = Field(default_factory=lambda given: default_d_ff(given["d_model"], given["activation"]))
    """width inside the feed-forward part; 4·d_model unless given (swiglu: 8/3, up to a multiple of 64)"""
    vocab_size: _Count
    """rows of the embedding, tokens; at least the tokenizer's"""
    seq_len: _Count
    """tokens that the model sees at once; a sample is one more"""
    position: Literal["learned", "rope"] = "learned"
    """position embedding"""
    rope_theta: _Positive = 10_000.0
    """base of the rotary wavelengths; used with position: rope"""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """layernorm has biases everywhere, as in GPT-2; rmsnorm has none"""
    qk_norm: bool = False
    """normalise queries and keys per head"""
    tie_embeddings: bool = True
    """the output head is the embedding matrix"""
    dropout: _Fraction = 0.0
    """share of activations dropped; equal curves on all layouts are promised at 0"""
    logit_softcap: _Positive | None = None
    """c in c·tanh(logits / c); null for none"""
    init: Literal["normal", "zero_projections"] = "normal"
    """normal as in GPT-2; zero_projections starts each block as the identity"""

    @property
    def is_gated(self) -> bool:
        """True if the activation is gated: the MLP has a third matrix, `gate`."""
        return self.activation in GATED_ACTIVATIONS

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        """Put the preset's values under the given ones."""
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset")
        return {**PRESETS.get(preset, {}), **given} if isinstance(preset, str) else given


def default_d_ff(d_model: int, activation: str) -> int:
    """Width of the feed-forward part: 4·d_model, or for swiglu 8/3·d_model up to a multiple of 64."""
    if activation not in GATED_ACTIVATIONS:
        return 4 * d_model
    return 64 * -(-8 * d_model // (3 * 64))


class Source(Section):
    """One part of a blend."""

    path: _Text
    """prefix of a .bin and .idx file"""
    weight: _Positive = 1.0
    """relative to the other sources, in any unit; see data.weight_counts"""
    max_epochs: _Positive | None = None
    """how often the source may be read in a run, at most; null for no limit"""


class DataSection(Section):
    """What is read. A prefix is the path without .bin or .idx."""

    tokenizer: _Text | None = None
    """a sentencepiece .model, a tokenizer.json, or a tiktoken encoding's name; null where no text is read or written"""
    train: Annotated[tuple[Source, ...], BeforeValidator(_sources)]
    """a prefix, or a list of {path, weight}"""
    weight_counts: Literal["samples", "epochs"] = "samples"
    """what weights are in proportion to: samples (or tokens) taken from a source, or times that it is read"""
    validation: Annotated[tuple[_Text, ...], BeforeValidator(_prefixes)] = ()
    """a prefix, or a list of prefixes, each with a loss of its own; null for no validation"""
    document_mask: bool = False
    """attention stays within each document, and token positions restart there"""
    eod: _CountOrNone | None = None
    """token id that ends a document; null for what the corpora say"""
    skip: Annotated[tuple[tuple[_CountOrNone, _CountOrNone], ...], BeforeValidator(_pairs)] = ()
    """data positions that are left out, a list of [first, last]; all others keep their samples"""


class BatchSection(Section):
    """How much is learned from at once."""

    global_size: _Count
    """samples per update, over all ranks"""


class OptimizerSection(Section):
    """How an update is made."""

    type: Literal["adamw", "muon"] = "adamw"
    """muon serves the block matrices, with AdamW for all else"""
    lr: _Positive
    """AdamW's peak learning rate; under muon that of embeddings, head and norms"""
    betas: Annotated[tuple[_Fraction, _Fraction], BeforeValidator(_pair)] = (0.9, 0.95)
    """AdamW's two averaging factors"""
    eps: _Positive = 1.0e-8
    """AdamW's denominator offset"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """decoupled decay per unit of learning rate, of matrices only"""
    clip: _Positive | None = 1.0
    """largest norm of the whole gradient; null for no clipping"""
    muon_lr: _Positive | None = None
    """peak learning rate of the block matrices; muon only"""
    muon_momentum: _Fraction | None = Field(default_factory=lambda given: 0.95 if given["type"] == "muon" else None)
    """muon only, 0.95 unless given"""


class ScheduleSection(Section):
    """How the learning rate goes: linear warm-up to the peak, then down to min_lr."""

    type: Literal["warmup_decay", "warmup_cosine", "wsd"] = "warmup_decay"
    """linear decay, cosine, or flat with a linear decay at the end"""
    warmup_updates: _CountOrNone
    """updates until the peak; update n uses peak·n/warmup_updates; 0 starts at the peak"""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """learning rate at the end of training"""
    decay_updates: _Count | None = None
    """updates of the decay at the end; wsd only"""


class LengthSection(Section):
    """How long training lasts: exactly one of the three."""

    updates: _Count | None = None
    """updates"""
    tokens: Annotated[int, Field(ge=1), BeforeValidator(_whole)] | None = None
    """tokens, rounded up to whole updates"""
    epochs: _Positive | None = None
    """times through the training data, rounded up to whole updates"""


class EvaluationSection(Section):
    """Validation during training."""

    every: _Count | None = None
    """updates between validations; null for none"""
    samples: _Count | None = None
    """sequences per validation; null for all of data.validation"""
    prompt: str | None = None
    """text to continue at each validation; null for none"""


class CheckpointSection(Section):
    """What is kept of a run."""

    every: _Count | None = 1000
    """updates between checkpoints; null for one at the end only"""
    keep_last: _Count | None = 3
    """checkpoints kept; null for all"""
    keep_every: _Count | None = None
    """updates between checkpoints that are kept for good; null for none"""
    asynchronous: bool = False
    """write beside training; takes host memory as large as each rank's share of weights and moments"""


class HealthSection(Section):
    """Bad numbers. A loss or gradient that is not finite is one always; a deviation is 1.48 × the median one."""

    loss_spike: _Positive | None = None
    """deviations above the median of recent losses from which on an update is skipped; null for never"""
    norm_spike: _Positive | None = None
    """the same of gradient norms, where it is too late to skip: the run goes back; null for never"""
    window: Annotated[int, Field(ge=8)] = 128
    """updates that are recent; before there are so many, nothing is a spike"""
    skips: _CountOrNone = 3
    """updates skipped in a row; at the next one the run goes back to a checkpoint"""
    compare_every: _Count | None = None
    """updates between comparisons of the weights that ranks hold alike; null for none"""


class LogSection(Section):
    """What the console shows; metrics.jsonl has every update."""

    every: _Count = 10
    """updates between lines on the console"""
    hang_after: _Positive = 60.0
    """seconds without progress (or 5 median updates, if that is longer) after which a run ends"""


class Recipe(Section):
    """What is trained: everything that moves the numbers, and nothing that does not."""

    run_dir: _Text
    """directory that the run writes and resumes from"""
    init_from: _Text | None = None
    """RUN@UPDATE or RUN@latest: begin as a branch of that run, with a schedule and length of one's own; null: anew"""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """of the initial weights, the data order and dropout"""
    precision: Precision | None = None
    """of weights and activations in training; null where the DeepSpeed config states it (else fp32)"""
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

    _places: Places = PrivateAttr(default_factory=Places)

    @property
    def document_end(self) -> int | None:
        """The token id that attention does not look beyond; None where it crosses documents.

        Raises UserError where data.eod is needed and not known.
        """
        if self.data.document_mask and self.data.eod is None:
            where = f"{self.place('data.document_mask')}  data.document_mask".strip()
            raise UserError("data.document_mask needs to know which token ends a document", where, "give data.eod")
        return self.data.eod if self.data.document_mask else None

    def place(self, key: str) -> str:
        """Where a dotted key was given: `FILE:LINE`, "command line", or "" for a default."""
        place = self._places.given.get(key)
        return place.at if place else ""
