"""A GPT as one list of layers, its output, and its initial weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megagpt.model.document_mask import Documents
from megagpt.model.layers import (
    MLP,
    Attention,
    Block,
    Head,
    LayerNorm,
    Past,
    PositionEmbedding,
    RMSNorm,
    Rotary,
    TokenEmbedding,
)
from megagpt.state import IGNORE_INDEX

if TYPE_CHECKING:
    from megagpt.config.recipe import ModelSection

INITIAL_STD = 0.02  # GPT-2


def layers(section: ModelSection, documents: Documents | None = None) -> list[nn.Module]:
    """The layers in order: token embedding, position embedding if learned, blocks, norm, head.

    Each takes the output of the one before it, so that a pipeline may cut the list anywhere. Weights are
    rubbish until `initialize`. With `documents`, which the caller lets see each batch, attention keeps within them.
    """
    width, rotates = section.d_model, section.position == "rope"
    rotary = Rotary(width // section.n_head, section.seq_len, section.rope_theta) if rotates else None
    tokens = TokenEmbedding(section.vocab_size, width, section.dropout if rotates else 0.0)
    positions = [] if rotates else [PositionEmbedding(section.seq_len, width, section.dropout)]
    blocks = [_block(section, rotary) for _ in range(section.n_layer)]
    aware: list[PositionEmbedding | Block] = [*positions, *blocks]
    for layer in aware:
        layer.documents = documents
    tied = tokens if section.tie_embeddings else None
    head = Head(section.vocab_size, width, section.logit_softcap, tied)
    return [tokens, *positions, *blocks, _norm(section), head]


def documents_of(section: ModelSection, end: int | None) -> Documents | None:
    """What `layers` need to keep attention within documents that end with the token `end`; None for no such thing."""
    # flex attention drops nothing out, and its kernels want heads of 16 at least
    in_blocks = section.dropout == 0 and section.d_model // section.n_head >= 16
    return None if end is None else Documents(end, in_blocks)


def _norm(section: ModelSection) -> nn.Module:
    return LayerNorm(section.d_model) if section.norm == "layernorm" else RMSNorm(section.d_model)


def _block(section: ModelSection, rotary: Rotary | None) -> Block:
    bias = section.norm == "layernorm"  # biases everywhere or nowhere: GPT-2's way and Llama's
    attention = Attention(
        section.d_model,
        section.d_model // section.n_head,
        section.n_head // section.n_kv_head,
        bias=bias,
        dropout=section.dropout,
        qk_norm=section.qk_norm,
        rotary=rotary,
    )
    mlp = MLP(section.d_model, section.d_ff, section.activation, bias=bias, dropout=section.dropout)
    return Block(_norm(section), attention, _norm(section), mlp)


class Output(dict[str, Tensor | None]):
    """What a GPT returns. A dict, because there ZeRO-3 finds the tensors that it must hook."""

    def __init__(self, loss: Tensor | None, hidden: Tensor, head: Head) -> None:
        super().__init__(loss=loss, hidden=hidden)
        self._head = head
        self._logits: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Summed cross-entropy over the normalizer, fp32 scalar. Raises ValueError without labels."""
        loss = self["loss"]
        if loss is None:
            raise ValueError("no labels were given, so there is no loss")
        return loss

    @property
    def logits(self) -> Tensor:
        """Logits [batch, seq, vocab_size], computed when first asked for."""
        if self._logits is None:
            self._logits = self._head(self["hidden"])
        return self._logits


class GPT(nn.Module):
    """A decoder-only transformer. Parameters are named `layers.{i}.…` by their place in `layers(section)`.

    With `document_end`, the token id that ends a document, attention keeps within documents.
    """

    def __init__(self, section: ModelSection, document_end: int | None = None) -> None:
        super().__init__()
        self.section = section
        self.documents = documents_of(section, document_end)
        self.layers = nn.ModuleList(layers(section, self.documents))

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, normalizer: Tensor | float | None = None
    ) -> Output:
        """Run the model on input_ids [batch, seq].

        With labels [batch, seq] (already shifted; -100 is ignored) the loss is the sum over the valid tokens
        divided by `normalizer`, by default their number here. Logits are made only when asked for.
        """
        if self.documents is not None:
            self.documents.see(input_ids)
        hidden = input_ids
        for layer in self.layers[:-1]:
            hidden = layer(hidden)
        head = self.layers[-1]
        loss = None
        if labels is not None:
            if normalizer is None:
                normalizer = (labels != IGNORE_INDEX).sum().clamp(min=1)
            loss = head(hidden, labels) / normalizer
        return Output(loss, hidden, head)  # type: ignore[arg-type]

    def past(self) -> list[Past]:
        """An empty memory for `read`, with room for seq_len tokens."""
        return [Past(self.section.seq_len) for _ in self.layers]

    def read(self, input_ids: Tensor, past: Sequence[Past]) -> Tensor:
        """Logits [batch, vocab_size] after the last of input_ids [batch, seq], which follow those in `past`.

        The first call may bring many tokens, each later one brings a single token. All count as one document.
        """
        hidden = input_ids
        for layer, memory in zip(self.layers[:-1], past[:-1], strict=True):
            hidden = layer(hidden, memory)
        logits: Tensor = self.layers[-1](hidden[:, -1])
        return logits


def initial_value(name: str, shape: Sequence[int], section: ModelSection, seed: int) -> Tensor:
    """The initial value of one parameter: fp32, on the CPU, full shape; a function of these arguments alone.

    Norm weights are 1, biases 0, matrices normal with standard deviation 0.02; the projections back into the
    residual stream 0.02 / √(2·n_layer) (GPT-2 paper, section 2.3), or 0 with `init: zero_projections`.
    """
    if len(shape) == 1:
        return torch.full(tuple(shape), 0.0 if name.endswith(".bias") else 1.0, device="cpu")
    std = INITIAL_STD
    if name.endswith((".attention.output.weight", ".mlp.down.weight")):
        if section.init == "zero_projections":
            return torch.zeros(*shape, device="cpu")
        std /= math.sqrt(2 * section.n_layer)
    # One stream per parameter: its values do not depend on what else is drawn, or in which order
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    return torch.empty(*shape, device="cpu").normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Set every parameter of `model` to its initial value, whatever its device and dtype."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.section, seed))
