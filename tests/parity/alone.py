"""Reference for document masking: runs each document of a batch separately through a model without masking."""

from __future__ import annotations

from itertools import pairwise

import torch

from megagpt.model.gpt import GPT


def logits(model: GPT, ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """Compute the logits of each document separately.

    Args:
        model: The model, without document masking.
        ids: Token ids [batch, seq].
        end: The token that ends a document; None if each sequence is one document.

    Returns:
        Logits [batch, seq, vocab_size], fp32.
    """
    if end is None:
        return model(ids).logits.float()
    rows = []
    for row in ids:
        cuts = [0, *(index + 1 for index, token in enumerate(row.tolist()) if token == end), len(row)]
        documents = [row[first:stop] for first, stop in pairwise(cuts) if first < stop]
        rows.append(torch.cat([model(document[None]).logits[0] for document in documents]))
    return torch.stack(rows).float()
