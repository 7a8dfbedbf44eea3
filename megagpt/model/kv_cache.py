"""Cache of keys and values, with which generation has to process each token only once."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Cache of the keys and values of all attention layers for up to `capacity` tokens.

    During a forward pass each attention layer calls `update` once. After the last layer, `GPT.decode` calls `advance`,
    which increases `length`, the number of tokens in the cache.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._storage: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens.

        Args:
            layer: index of the attention layer
            keys: keys of the new tokens [B, T, K, h]
            values: values of the new tokens [B, T, K, h]

        Returns:
            The keys and values of all tokens so far, each [B, length + T, K, h].

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
        """Increase `length` by the number of tokens that every layer has stored in this forward pass."""
        self.length += tokens
