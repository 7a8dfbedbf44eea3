"""The sidecar file PREFIX.json, which holds metadata of a corpus that .bin and .idx cannot hold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.files import parse_json

VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """Metadata of one corpus, written when it was prepared. Each attribute is a key of the JSON file.

    Attributes:
        tokenizer_sha256: SHA-256 hash of the tokenizer file.
        vocab_size: number of ids in the tokenizer's vocabulary.
        eod: id of the end-of-document token.
        documents: number of documents, including empty ones.
        tokens: number of ids in .bin.
        text_bytes: size of the text in bytes of UTF-8, without end-of-document tokens.
        bin_crc32: CRC-32 (zlib) of .bin.
        idx_crc32: CRC-32 (zlib) of .idx.
        version: version of the sidecar format.
        bin_ranges: length in bytes and CRC-32 of consecutive ranges of .bin, from which damage can be located.
        made: information for humans on how the corpus was made, such as the megagpt version, options and warnings.
        packed: seq_len of a packed corpus, or None if the corpus is not packed. A packed corpus holds samples of
            `packed + 1` tokens, and each sample is stored as one sequence and one document.
        padding: number of padding tokens in a packed corpus. A padding token is an end-of-document token that follows
            another end-of-document token.
    """

    tokenizer_sha256: str
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    text_bytes: int
    bin_crc32: int
    idx_crc32: int
    version: int = VERSION
    bin_ranges: tuple[tuple[int, int], ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    packed: int | None = None
    padding: int = 0

    def to_json(self) -> str:
        """Return the sidecar as a JSON object, with the attributes as keys."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# Default values of keys that older sidecars do not have.
_DEFAULTS: dict[str, Any] = {"bin_ranges": [], "made": {}, "packed": None, "padding": 0}
_NOT_INTEGERS: dict[str, tuple[type, ...]] = {
    "tokenizer_sha256": (str,), "bin_ranges": (list,), "made": (dict,), "packed": (int, type(None)),
}  # fmt: skip
_TYPES = {key.name: _NOT_INTEGERS.get(key.name, (int,)) for key in dataclasses.fields(Sidecar)}


def read_sidecar(path: Path) -> Sidecar | None:
    """Read a sidecar file. Returns None if the file does not exist. Raises UserError if it is invalid."""
    do = f"run `megagpt prepare` again, or remove {path.name} to use the corpus unverified"
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the sidecar of the corpus: {error}", str(path), do) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(f"the sidecar has version {version}, but only version {VERSION} is supported", str(path), do)
    if "stretches" in content:  # earlier name of the key "bin_ranges"
        content["bin_ranges"] = content["stretches"]
    values = {key: content.get(key, _DEFAULTS.get(key)) for key in _TYPES}
    invalid = [key for key, types in _TYPES.items() if type(values[key]) not in types]
    if invalid:
        raise UserError(f"the sidecar has missing or invalid keys: {', '.join(invalid)}", str(path), do)
    values["bin_ranges"] = tuple((size, crc32) for size, crc32 in values["bin_ranges"])
    return Sidecar(**values)


def check_same_tokenizer(prefix: str, sidecar: Sidecar | None, other: str, sha256: str) -> None:
    """Raise UserError if a corpus was made with another tokenizer.

    Args:
        prefix: prefix of the corpus.
        sidecar: sidecar of the corpus. If it is None, the tokenizer is unknown and not checked.
        other: path of the tokenizer, or prefix of a corpus that was made with it, for the error message.
        sha256: SHA-256 hash of that tokenizer.
    """
    if sidecar and sidecar.tokenizer_sha256 != sha256:
        where = f"{sidecar.tokenizer_sha256[:12]}…  {prefix}\n{sha256[:12]}…  {other}"
        do = "use the tokenizer that the corpus was prepared with, or prepare the corpus again"
        raise UserError("different tokenizers were used", where, do)
