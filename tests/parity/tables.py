"""Reads and writes docs/parity.md."""

from importlib.metadata import version

from megagpt.parity.curve import TOLERANCES


def known(path):
    """Read the differences by case id and kind. A run of only some layouts keeps the others in the table."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0][1:], map(float, row[1:]), strict=True)) for row in rows[1:]}


def table(rows, full):
    """Return the content of docs/parity.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("deepspeed", "torch"))
    limits = "; ".join(f"{name} {t.loss:.0e}, {t.norm:.0e} and {t.weights:.0e}" for name, t in TOLERANCES.items())
    kinds = next(iter(rows.values()))
    lines = [
        "# Parity: every layout gives the same curve",
        "",
        f"{len(rows)} layouts, compared with plain PyTorch in one process over {'100' if full else '12'} updates "
        f"(the rows named `stages-…`: 12), on CPU ranks with {versions}. Written by "
        f"`pytest tests/parity/test_same_curve.py{' --full' if full else ''} --parity-table docs/parity.md`.",
        "",
        "The columns are relative differences: the largest over all updates of the loss (`loss`) and of the gradient "
        "norm before clipping (`norm`); of the loss on held-out samples before and after training (`held-out`); and "
        "the largest over all tensors of the distance between final weights, relative to how far the tensor moved "
        f"from its initial value (`weights`). Bounds of loss, norm and weights: {limits}. megagpt/parity/curve.py has "
        "the reasons. Initial values and numbers of tokens are exactly equal. tests/parity/layouts.py defines the "
        "layouts.",
        "",
        "| layout | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
        *(f"| {case} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |" for case, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"
