"""Keys and values of the tokens that a model has already read, kept so that generation reads each token only once."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of all attention layers, for up to `capacity` tokens.

    `length` is the number of tokens that all layers have stored. During a forward pass each layer calls `update` once,
    and `GPT.decode` calls `advance` after the last one.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._storage: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens.

        Args:
            layer: number of the attention layer
            keys: [B, T, K, h]
            values: [B, T, K, h]

        Returns:
            The layer's keys and values of all tokens so far, each [B, length + T, K, h].

        """
        batch, tokens, heads, width = keys.shape
        storage = self._storage[layer]
        if storage is None:
            both = keys.new_empty(2, batch, self.capacity, heads, width)
            self._storage[layer] = storage = (both[0], both[1])
        end = self.length + tokens
        for stored, new in zip(storage, (keys, values), strict=True):
            stored[:, self.length : end] = new
        return storage[0][:, :end], storage[1][:, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has now stored."""
        self.length += tokens
