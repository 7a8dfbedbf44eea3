"""PREFIX.json: what .bin and .idx cannot say about a corpus."""

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
    """Facts of one corpus, written when it was prepared.

    `tokenizer_sha256` is the hash of the tokenizer's file, `documents` counts all documents (empty ones too),
    `tokens` the ids in .bin, `text_bytes` the UTF-8 bytes of the text they stand for (no end-of-document symbol
    counted), and the checksums are zlib's crc32 of the whole files. `stretches` of .bin, one after the other, each
    have their bytes and checksum; `made` tells people how the corpus was made: version, options, what was odd.
    A corpus `packed` for a seq_len holds samples of `packed + 1` tokens, one sequence and entry of `documents` each;
    `padding` of its tokens are no text: an end-of-document symbol after another.
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
    stretches: tuple[tuple[int, int], ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    packed: int | None = None
    padding: int = 0

    def to_json(self) -> str:
        """One JSON object, keys in the order above."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# which the first sidecars did not have
_LATER: dict[str, Any] = {"stretches": [], "made": {}, "packed": None, "padding": 0}
_OTHERS: dict[str, tuple[type, ...]] = {
    "tokenizer_sha256": (str,), "stretches": (list,), "made": (dict,), "packed": (int, type(None)),
}  # fmt: skip
_TYPES = {one.name: _OTHERS.get(one.name, (int,)) for one in dataclasses.fields(Sidecar)}


def read_sidecar(path: Path) -> Sidecar | None:
    """Read the sidecar, or None where there is none. Raises UserError if it cannot be understood."""
    do = f"run `megagpt prepare` again, or remove {path.name} to use the corpus unverified"
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the sidecar of the corpus: {error}", str(path), do) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(f"the sidecar is of version {version}, not {VERSION}", str(path), do)
    wrong = [name for name, kinds in _TYPES.items() if type(content.get(name, _LATER.get(name))) not in kinds]
    if wrong:
        raise UserError(f"the sidecar lacks or garbles {', '.join(wrong)}", str(path), do)
    values = {name: content.get(name, _LATER.get(name)) for name in _TYPES}
    values["stretches"] = tuple((size, crc32) for size, crc32 in values["stretches"])
    return Sidecar(**values)


def check_one_tokenizer(prefix: str, facts: Sidecar | None, other: str, sha256: str) -> None:
    """Raise UserError if the sidecar of a corpus names another tokenizer than `sha256`, which is that of `other`."""
    if facts and facts.tokenizer_sha256 != sha256:
        where = f"{facts.tokenizer_sha256[:12]}…  {prefix}\n{sha256[:12]}…  {other}"
        do = "use the tokenizer that the corpus was made with, or prepare it anew"
        raise UserError("these two are of different tokenizers", where, do)
