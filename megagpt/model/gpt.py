"""A GPT as one list of layers, its output, and its initial weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megagpt.model.activations import ACTIVATIONS
from megagpt.model.attention import Attention
from megagpt.model.context import ContextBuilder
from megagpt.model.kv_cache import KVCache
from megagpt.model.layers import MLP, Block, Head, LayerNorm, PositionEmbedding, RMSNorm, TokenEmbedding
from megagpt.model.parallel import WHOLE, ParallelLayers
from megagpt.model.shapes import has_bias, head_dim, linear_shapes
from megagpt.state import IGNORE_INDEX

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

INITIAL_STD = 0.02  # GPT-2


def build_layers(section: ModelSection, parallel: ParallelLayers = WHOLE) -> list[nn.Module]:
    """Build the layers in order: token embedding, position embedding if learned, blocks, norm, head.

    Each layer takes the output of the one before it and the context of the forward pass, so that a pipeline can split
    the list anywhere. Weights are uninitialized until `initialize`.

    Args:
        section: the model
        parallel: this rank's part in tensor and sequence parallelism

    Returns:
        The layers, whose parameters are those of `shapes.layer_shapes`.

    """
    width, rotates, shard = section.d_model, section.position == "rope", parallel.vocabulary
    tokens = TokenEmbedding(section.vocab_size, width, section.dropout if rotates else 0.0, shard)
    positions = [] if rotates else [PositionEmbedding(section.seq_len, width, section.dropout)]
    blocks = [_block(section, number, parallel) for number in range(section.n_layer)]
    tied = tokens if section.tie_embeddings else None
    head = Head(section.vocab_size, width, section.logit_softcap, tied, shard)
    return [tokens, *positions, *blocks, _norm(section), head]


def _norm(section: ModelSection) -> nn.Module:
    return LayerNorm(section.d_model) if section.norm == "layernorm" else RMSNorm(section.d_model)


def _block(section: ModelSection, number: int, parallel: ParallelLayers) -> Block:
    linears = {name: parallel.linear(shape, has_bias(section)) for name, shape in linear_shapes(section).items()}
    attention = Attention(
        number,
        linears["attention.qkv"],
        linears["attention.output"],
        head_dim=head_dim(section),
        group=section.n_head // section.n_kv_head,
        dropout=section.dropout,
        qk_norm=section.qk_norm,
        sequence=parallel.sequence,
    )
    mlp = MLP(
        ACTIVATIONS[section.activation],
        gate=linears.get("mlp.gate"),
        up=linears["mlp.up"],
        down=linears["mlp.down"],
        dropout=section.dropout,
    )
    return Block(_norm(section), attention, _norm(section), mlp)


class Output(dict[str, Tensor | None]):
    """Result of a GPT's forward pass. It is a dict because ZeRO-3 finds the tensors in it that need hooks."""

    def __init__(self, loss: Tensor | None, hidden: Tensor, head: Head) -> None:
        super().__init__(loss=loss, hidden=hidden)
        self._head = head
        self._logits: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Summed cross-entropy divided by the normalizer, an fp32 scalar. Raises ValueError without labels."""
        loss = self["loss"]
        if loss is None:
            raise ValueError("no labels were given, so there is no loss")
        return loss

    @property
    def logits(self) -> Tensor:
        """Logits [batch, seq, vocab_size], computed on first access."""
        if self._logits is None:
            self._logits = self._head(self["hidden"])
        return self._logits


class GPT(nn.Module):
    """A decoder-only transformer. Parameters are named `layers.{i}.…` by their index in `build_layers(section)`.

    Args:
        section: the model
        document_end: token id that ends a document; if given, attention is masked at document boundaries
        parallel: this rank's part in tensor and sequence parallelism

    """

    def __init__(
        self, section: ModelSection, document_end: int | None = None, parallel: ParallelLayers = WHOLE
    ) -> None:
        super().__init__()
        self.section = section
        self.contexts = ContextBuilder(section, document_end, parallel.sequence)
        self.layers = nn.ModuleList(build_layers(section, parallel))

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, normalizer: Tensor | float | None = None
    ) -> Output:
        """Run the model, and compute the loss if labels are given.

        Args:
            input_ids: [batch, seq]
            labels: [batch, seq], already shifted; -100 is ignored
            normalizer: divides the loss summed over the valid tokens; by default their number in `labels`

        Returns:
            The loss, and logits that are computed only when they are read.

        """
        context = self.contexts.for_batch(input_ids)
        hidden = input_ids
        for layer in self.layers[:-1]:
            hidden = layer(hidden, context)
        head = self.layers[-1]
        loss = None
        if labels is not None:
            if normalizer is None:
                normalizer = (labels != IGNORE_INDEX).sum().clamp(min=1)
            loss = head(hidden, labels) / normalizer
        return Output(loss, hidden, head)  # type: ignore[arg-type]

    def new_kv_cache(self) -> KVCache:
        """Return an empty cache for `decode`, with room for seq_len tokens."""
        return KVCache(self.section.n_layer, self.section.seq_len)

    def decode(self, input_ids: Tensor, kv_cache: KVCache) -> Tensor:
        """Read the tokens that follow those in the cache.

        Args:
            input_ids: [batch, seq]; seq is 1 unless the cache is empty
            kv_cache: extended by these tokens. All tokens count as one document.

        Returns:
            Logits [batch, vocab_size] after the last token.

        """
        context = self.contexts.for_decoding(input_ids.shape[1], kv_cache, input_ids.device)
        hidden = input_ids
        for layer in self.layers[:-1]:
            hidden = layer(hidden, context)
        kv_cache.advance(input_ids.shape[1])
        logits: Tensor = self.layers[-1](hidden[:, -1])
        return logits


def initial_value(name: str, shape: Sequence[int], section: ModelSection, seed: int) -> Tensor:
    """Compute the initial value of one parameter from these arguments alone.

    Norm weights are 1, biases 0, and matrices normal with standard deviation 0.02. The projections back into the
    residual stream have 0.02 / √(2·n_layer) (GPT-2 paper, section 2.3), or are 0 with `init: zero_projections`.

    Args:
        name: the parameter's name in `GPT`
        shape: its whole shape, before any parallelism
        section: the model
        seed: the recipe's seed

    Returns:
        An fp32 tensor on the CPU.

    """
    if len(shape) == 1:
        return torch.full(tuple(shape), 0.0 if name.endswith(".bias") else 1.0, device="cpu")
    std = INITIAL_STD
    if name.endswith((".attention.output.weight", ".mlp.down.weight")):
        if section.init == "zero_projections":
            return torch.zeros(*shape, device="cpu")
        std /= math.sqrt(2 * section.n_layer)
    # One random stream per parameter, so that its values do not depend on what else is drawn, or in which order
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(*shape, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Set every parameter of `model` to its initial value, on any device and in any dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.section, seed))
