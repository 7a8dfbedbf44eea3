"""Saves tokenizers in transformers' format.

A `tokenizer.json` is saved unchanged. A SentencePiece model is converted to a BPE tokenizer with the same merges.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagpt.tokenizer.sentencepiece_model import EOD_PIECE, bpe_vocab_and_merges
from megagpt.tokenizer.tokenizer import Tokenizer

_UNKNOWN = "<unk>"
# Parts of a text whose boundaries no merge crosses, as in the cached encoder.
_WORDS = "\n|\u2581*[^\u2581\n]+|\u2581+"


def save_tokenizer(transformers: Any, path: str | None, folder: Path, seq_len: int) -> str | None:
    """Save a tokenizer in a folder from which transformers' `from_pretrained` can load it.

    SentencePiece models that are not word-local and tiktoken encodings are not converted, because transformers has its
    own converters for them.

    Args:
        transformers: the imported package `transformers`.
        path: path of the tokenizer, or None if the recipe specifies none.
        folder: folder in which the tokenizer is saved.
        seq_len: maximum number of tokens per sequence of the model.

    Returns:
        `path`, or None if no tokenizer was saved.
    """
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.is_word_local:
        backend = _bpe_backend(Path(path).read_bytes())
        special = {"eos_token": EOD_PIECE, "unk_token": _UNKNOWN}
    elif Path(path).is_file() and Path(path).read_bytes().lstrip().startswith(b"{"):
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(path)
        special = {"eos_token": str(backend.id_to_token(tokenizer.eod))}
    else:
        return None
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=seq_len, clean_up_tokenization_spaces=False, **special
    )
    fast.save_pretrained(folder)
    return path


def _bpe_backend(model: bytes) -> Any:
    """Convert a word-local SentencePiece model to a BPE tokenizer of the package `tokenizers`, with the same merges.

    The new tokenizer encodes the text `<eod>` to the control symbol, as is usual in transformers. SentencePiece never
    does this.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    ids, merges = bpe_vocab_and_merges(model)
    fast = Fast(models.BPE(ids, merges, unk_token=_UNKNOWN, fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "\u2581")
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([_UNKNOWN, EOD_PIECE])
    return fast
