"""A tokenizer as transformers reads it: one of Hugging Face's as it is, one of sentencepiece's as the same merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megagpt.data.sentencepiece_model import EOD_PIECE, bpe_vocab_and_merges
from megagpt.data.tokenizer import Tokenizer

_UNKNOWN = "<unk>"
_WORDS = "\n|\u2581*[^\u2581\n]+|\u2581+"  # where no merge crosses, as in prepare


def save_tokenizer(transformers: Any, path: str | None, folder: Path, seq_len: int) -> str | None:
    """Write the tokenizer into the folder; its path, or None where there is none that can be written.

    Models of sentencepiece's that others trained, and tiktoken's encodings, are left out: transformers has its own
    ways to them.
    """
    if path is None:
        return None
    ours = Tokenizer(path)
    if ours.is_word_local:
        theirs, special = _merges(Path(path).read_bytes()), {"eos_token": EOD_PIECE, "unk_token": _UNKNOWN}
    elif Path(path).is_file() and Path(path).read_bytes().lstrip().startswith(b"{"):
        import tokenizers

        theirs = tokenizers.Tokenizer.from_file(path)
        special = {"eos_token": str(theirs.id_to_token(ours.eod))}
    else:
        return None
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=theirs, model_max_length=seq_len, clean_up_tokenization_spaces=False, **special
    )
    fast.save_pretrained(folder)
    return path


def _merges(model: bytes) -> Any:
    """The same cuts by `tokenizers`: what a piece is made of, in the order in which sentencepiece would make it.

    The text `<eod>` becomes the control symbol there, as is usual there; never in sentencepiece.
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
