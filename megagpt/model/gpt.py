"""The GPT as a list of layers, the output of its forward pass, and its initial weights."""

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

INITIAL_STD = 0.02  # standard deviation of the initial weights, as in GPT-2


def build_layers(section: ModelSection, parallel: ParallelLayers = WHOLE) -> list[nn.Module]:
    """Build the layers in order: token embedding, learned position embedding if there is one, blocks, norm and head.

    The inputs of each layer are the output of the previous layer and the context of the forward pass, so a pipeline can
    split the list anywhere. The weights are uninitialized until `initialize` is called.

    Args:
        section: model section of the recipe
        parallel: settings with which this rank builds its shards of the layers

    Returns:
        The layers. Their parameters have the shapes of `shapes.layer_shapes`.

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
    """Result of a GPT's forward pass. It is a dict, so that ZeRO-3 finds the tensors that need backward hooks."""

    def __init__(self, loss: Tensor | None, hidden: Tensor, head: Head) -> None:
        super().__init__(loss=loss, hidden=hidden)
        self._head = head
        self._logits: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Sum of the cross-entropies divided by the normalizer, an fp32 scalar. Raises ValueError without labels."""
        loss = self["loss"]
        if loss is None:
            raise ValueError("no labels were given, so there is no loss")
        return loss

    @property
    def logits(self) -> Tensor:
        """Logits [batch, seq, vocab_size], which are computed on first access."""
        if self._logits is None:
            self._logits = self._head(self["hidden"])
        return self._logits


class GPT(nn.Module):
    """Decoder-only transformer. Names of parameters begin with `layers.{i}`, the index in `build_layers(section)`.

    Args:
        section: model section of the recipe
        document_end: id of the token that ends a document. If given, attention is masked at document boundaries
        parallel: settings with which this rank builds its shards of the layers

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
            input_ids: token ids [batch, seq]
            labels: ids of the next tokens [batch, seq]. Positions with -100 do not contribute to the loss
            normalizer: divisor of the summed loss. By default, the number of labels that are not -100

        Returns:
            The loss and the logits. The logits are computed only when they are accessed.

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
        """Return an empty cache for `decode` with a capacity of seq_len tokens."""
        return KVCache(self.section.n_layer, self.section.seq_len)

    def decode(self, input_ids: Tensor, kv_cache: KVCache) -> Tensor:
        """Run the model on tokens that follow those in the cache, and append them to the cache.

        All tokens are treated as one document.

        Args:
            input_ids: token ids [batch, seq], where seq is 1 unless the cache is empty
            kv_cache: keys and values of the earlier tokens

        Returns:
            The logits [batch, vocab_size] of the token that follows the last one.

        """
        context = self.contexts.for_decoding(input_ids.shape[1], kv_cache, input_ids.device)
        hidden = input_ids
        for layer in self.layers[:-1]:
            hidden = layer(hidden, context)
        kv_cache.advance(input_ids.shape[1])
        logits: Tensor = self.layers[-1](hidden[:, -1])
        return logits


def initial_value(name: str, shape: Sequence[int], section: ModelSection, seed: int) -> Tensor:
    """Compute the initial value of one parameter. The result depends only on the arguments.

    Normalization weights are 1 and biases are 0. Matrices are normally distributed with a standard deviation of 0.02.
    For the projections back into the residual stream, the standard deviation is 0.02 / √(2·n_layer) (GPT-2 paper,
    section 2.3). With `init: zero_projections`, these projections are 0.

    Args:
        name: name of the parameter in `GPT`
        shape: shape of the whole parameter
        section: model section of the recipe
        seed: seed of the recipe

    Returns:
        The value, an fp32 tensor on the CPU.

    """
    if len(shape) == 1:
        return torch.full(tuple(shape), 0.0 if name.endswith(".bias") else 1.0, device="cpu")
    std = INITIAL_STD
    if name.endswith((".attention.output.weight", ".mlp.down.weight")):
        if section.init == "zero_projections":
            return torch.zeros(*shape, device="cpu")
        std /= math.sqrt(2 * section.n_layer)
    # Each parameter has its own random number generator, so its values do not depend on other parameters or on the
    # order in which they are initialized.
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(*shape, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Set every parameter of `model` to its initial value. The model may be on any device and have any dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.section, seed))
