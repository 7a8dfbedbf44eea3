"""A run's newest checkpoint in Hugging Face's format, held to the same logits before it gets its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagpt import files
from megagpt.errors import MachineError, UserError
from megagpt.export import architectures, vocabularies
from megagpt.run import trained

if TYPE_CHECKING:
    from megagpt.model.gpt import GPT

_TRAINED_IN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ALLOWED = 1e-4  # of the largest logit; fp32 sums in another order stay below a tenth of it


@dataclass(frozen=True)
class Exported:
    """Where a model went, as what, and how far its logits are from ours (as a share of the largest one)."""

    output: str
    update: int
    architecture: str
    dtype: str
    parameters: int
    tokenizer: str | None
    difference: float

    def __str__(self) -> str:
        tokenizer = f"its tokenizer from {self.tokenizer}" if self.tokenizer else "no tokenizer: add the one it learned"
        return (
            f"{self.output}: update {self.update} as {self.architecture}, {self.parameters:,} parameters in "
            f"{self.dtype}; {tokenizer}\n"
            f"  its logits in transformers, fp32, differ by {self.difference:.1e} of the largest one"
        )


def export(run: Path, output: Path, to: str = "hf", dtype: str | None = None) -> Exported:
    """Write a run's newest valid checkpoint as a folder that transformers' `from_pretrained` reads.

    Raises UserError for a model that no architecture of transformers computes, a folder that is not empty, and
    where transformers is not installed.
    """
    if to != "hf":
        raise UserError(f"there is no format {to}", "--to", "give hf: many libraries read Hugging Face's format")
    if dtype not in (None, *_TRAINED_IN.values()):
        raise UserError(f"{dtype} is no type of weights", "--dtype", f"give {', '.join(_TRAINED_IN.values())}")
    transformers = _transformers()
    if output.is_dir() and any(output.iterdir()):
        raise UserError("the output folder is not empty", str(output), "name another one, or remove it")
    model = trained.load(run)
    model.model.cpu()
    kept = dtype or _TRAINED_IN[model.recipe.precision or "fp32"]
    theirs = architectures.convert(transformers, model.model, getattr(torch, kept))
    partial = output.with_name(f"{output.name}.partial")
    files.remove_folder(partial)
    theirs.save_pretrained(partial)
    tokenizer = vocabularies.save_tokenizer(
        transformers, model.recipe.data.tokenizer, partial, model.recipe.model.seq_len
    )
    difference = _difference(transformers, model.model, partial, kept)
    if output.is_dir():
        output.rmdir()
    files.rename(partial, output)
    update, parameters = model.checkpoint.state.update, sum(p.numel() for p in theirs.parameters())
    return Exported(str(output), update, type(theirs).__name__, kept, parameters, tokenizer, difference)


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is here: nothing is to be asked of a hub
    try:
        import transformers
    except ImportError:
        raise UserError("exporting needs the package transformers", "", 'pip install "megagpt[export]"') from None
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


@torch.no_grad()
def _difference(transformers: Any, ours: GPT, folder: Path, dtype: str) -> float:
    """Largest difference of logits on random tokens, with our weights rounded as the written ones are, in fp32.

    Raises MachineError where the folder does not hold the same function.
    """
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    ours.to(getattr(torch, dtype)).float()
    shape = (2, min(ours.section.seq_len, 256))
    ids = torch.randint(ours.section.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    expected, actual = ours(ids).logits, theirs(input_ids=ids).logits
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference <= _ALLOWED:
        what = f"the written model is not the trained one: its logits differ by {difference:.1e} of the largest one"
        raise MachineError(what, str(folder), f"report this, with transformers {transformers.__version__}")
    return difference
