"""Each document of a batch run alone through a model that knows no documents: what masking must come to."""

from __future__ import annotations

from itertools import pairwise

import torch

from megagpt.model.gpt import GPT


def logits(model: GPT, ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """Logits [batch, seq, vocab_size] of ids [batch, seq], fp32; a document ends with `end` (None: all is one)."""
    if end is None:
        return model(ids).logits.float()
    rows = []
    for row in ids:
        cuts = [0, *(place + 1 for place, token in enumerate(row.tolist()) if token == end), len(row)]
        documents = [row[first:stop] for first, stop in pairwise(cuts) if first < stop]
        rows.append(torch.cat([model(document[None]).logits[0] for document in documents]))
    return torch.stack(rows).float()
