"""The command `megagpt export`, which converts a run's newest checkpoint to Hugging Face's format.

The logits of the exported model are compared with those of the original model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megagpt import files
from megagpt.checkpoint import loaded_model
from megagpt.errors import MachineError, UserError
from megagpt.inference.export import architectures, vocabularies

if TYPE_CHECKING:
    from megagpt.model.gpt import GPT

_DTYPE_BY_PRECISION = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Maximum difference of logits, relative to the largest logit. A different order of fp32 sums causes differences of less
# than a tenth of it.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportResult:
    """Summary of an exported model.

    Attributes:
        output: folder of the exported model.
        update: update at which the checkpoint was saved.
        architecture: name of the model class in transformers.
        dtype: type of the exported weights.
        parameters: number of parameters.
        tokenizer: path of the tokenizer that was also exported, or None if no tokenizer was exported.
        difference: largest difference between the logits of the exported model and those of the original model,
            relative to the largest logit.
    """

    output: str
    update: int
    architecture: str
    dtype: str
    parameters: int
    tokenizer: str | None
    difference: float

    def __str__(self) -> str:
        tokenizer = "no tokenizer (add the one that it was trained with)"
        if self.tokenizer:
            tokenizer = f"tokenizer from {self.tokenizer}"
        return (
            f"{self.output}: update {self.update} as {self.architecture}, {self.parameters:,} parameters in "
            f"{self.dtype}; {tokenizer}\n"
            f"  logits in transformers (fp32) differ by at most {self.difference:.1e} of the largest logit"
        )


def export(run: Path, output: Path, to: str = "hf", dtype: str | None = None) -> ExportResult:
    """Write the newest valid checkpoint of a run as a folder that transformers' `from_pretrained` reads.

    Args:
        run: run directory.
        output: folder of the exported model. It must be empty if it exists.
        to: format of the exported model. Only `hf` is supported.
        dtype: type of the exported weights. If None, the type is that of the training precision.

    Returns:
        A summary of the exported model.

    Raises:
        UserError: an argument is not supported, transformers is not installed or has no equivalent architecture, or the
            folder is not empty.
        MachineError: the exported model does not compute the same logits.
    """
    if to != "hf":
        raise UserError(f"unknown format {to}", "--to", "give hf: many libraries read Hugging Face's format")
    if dtype not in (None, *_DTYPE_BY_PRECISION.values()):
        raise UserError(f"unsupported dtype {dtype}", "--dtype", f"give {', '.join(_DTYPE_BY_PRECISION.values())}")
    transformers = _transformers()
    if output.is_dir() and any(output.iterdir()):
        raise UserError("the output folder is not empty", str(output), "choose another one, or remove it")
    loaded = loaded_model.load(run)
    loaded.model.cpu()
    dtype = dtype or _DTYPE_BY_PRECISION[loaded.recipe.precision or "fp32"]
    theirs = architectures.convert(transformers, loaded.model, getattr(torch, dtype))
    partial = output.with_name(f"{output.name}.partial")
    files.remove_folder(partial)
    theirs.save_pretrained(partial)
    tokenizer = vocabularies.save_tokenizer(
        transformers, loaded.recipe.data.tokenizer, partial, loaded.recipe.model.seq_len
    )
    difference = _check_logits(transformers, loaded.model, partial, dtype)
    if output.is_dir():
        output.rmdir()
    files.rename(partial, output)
    parameters = sum(parameter.numel() for parameter in theirs.parameters())
    return ExportResult(
        output=str(output),
        update=loaded.checkpoint.state.update,
        architecture=type(theirs).__name__,
        dtype=dtype,
        parameters=parameters,
        tokenizer=tokenizer,
        difference=difference,
    )


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all files are local, so the hub need not be contacted
    try:
        import transformers
    except ImportError:
        raise UserError("exporting needs the package transformers", "", 'pip install "megagpt[export]"') from None
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return transformers


@torch.no_grad()
def _check_logits(transformers: Any, ours: GPT, folder: Path, dtype: str) -> float:
    """Compare the logits of the exported model with those of our model on random tokens.

    Both models compute in fp32, with weights rounded to `dtype`. Returns the largest difference, relative to the
    largest logit. Raises MachineError if the difference is too large.
    """
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    ours.to(getattr(torch, dtype)).float()
    shape = (2, min(ours.section.seq_len, 256))
    ids = torch.randint(ours.section.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    expected, actual = ours(ids).logits, theirs(input_ids=ids).logits
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        what = f"the exported model is not equivalent: its logits differ by {difference:.1e} of the largest logit"
        raise MachineError(what, str(folder), f"report this as a bug, with transformers {transformers.__version__}")
    return difference
