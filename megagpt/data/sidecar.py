"""PREFIX.json: what .bin and .idx cannot say about a corpus."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UserError

VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """Facts of one corpus, written when it was prepared.

    `tokenizer_sha256` is the hash of the tokenizer's file, `documents` counts all documents (empty ones too),
    `tokens` the ids in .bin, `text_bytes` the UTF-8 bytes of the text they stand for (no end-of-document symbol
    counted), and the checksums are zlib's crc32 of the whole files.
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

    def to_json(self) -> str:
        """One JSON object, keys in the order above."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_sidecar(path: Path) -> Sidecar | None:
    """Read the sidecar, or None where there is none. Raises UserError if it cannot be understood."""
    do = f"run `megagpt prepare` again, or remove {path.name} to use the corpus unverified"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the sidecar of the corpus: {error}", str(path), do) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise UserError(f"the sidecar is of version {version}, not {VERSION}", str(path), do)
    types = {field.name: str if field.name == "tokenizer_sha256" else int for field in dataclasses.fields(Sidecar)}
    wrong = [name for name, kind in types.items() if type(content.get(name)) is not kind]
    if wrong:
        raise UserError(f"the sidecar lacks or garbles {', '.join(wrong)}", str(path), do)
    return Sidecar(**{name: content[name] for name in types})
