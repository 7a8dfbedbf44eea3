"""Saves tokenizers in transformers' format: a `tokenizer.json` as it is, a SentencePiece model as its BPE merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagpt.tokenizer.sentencepiece_model import EOD_PIECE, bpe_vocab_and_merges
from megagpt.tokenizer.tokenizer import Tokenizer

_UNKNOWN = "<unk>"
_WORDS = "\n|\u2581*[^\u2581\n]+|\u2581+"  # parts of a text that no merge crosses, as in the cached encoder


def save_tokenizer(transformers: Any, path: str | None, folder: Path, seq_len: int) -> str | None:
    """Save a tokenizer into a folder that transformers' `from_pretrained` reads.

    Args:
        transformers: the imported package.
        path: path of our tokenizer; None if the recipe has none.
        folder: the folder to write to.
        seq_len: maximum number of tokens of the model.

    Returns:
        `path`; None if there is no tokenizer, or one that cannot be converted. SentencePiece models that are not
        word-local and tiktoken encodings are not converted: transformers has its own converters for them.
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
    """Convert a word-local SentencePiece model to a BPE tokenizer of the package tokenizers, with the same merges.

    There the text `<eod>` encodes to the control symbol, as is usual in transformers; in SentencePiece it never does.
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
