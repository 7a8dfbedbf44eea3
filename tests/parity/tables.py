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
        "# Every layout, one curve",
        "",
        f"{len(rows)} layouts against plain PyTorch in one process ({'100' if full else '12'} updates), on CPU ranks "
        f"with {versions}. Written by `pytest tests/parity/test_same_curve.py{' --full' if full else ''} "
        "--parity-table docs/parity.md`.",
        "",
        "Largest relative difference over all updates of the loss and of the gradient norm before clipping; of the "
        "loss on held-out samples before and after; and of one tensor's whole way from its initial value. "
        f"Allowed of loss, norm and weights: {limits} (reasons: megagpt/parity/curve.py). Initial values are equal "
        "bit for bit, and so are the numbers of tokens. The layouts: tests/parity/layouts.py.",
        "",
        "| layout | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 1) + "|",
        *(f"| {case} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |" for case, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"
