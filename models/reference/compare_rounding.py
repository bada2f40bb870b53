"""How far 4-bit codes of each method move a checkpoint, and how much of it is chance.

`scripts/quantization-table` rounds one way. Which weights share a block is chance, and the held-out loss moves with it as
much as with the method. So this program rounds the columns of every matrix in several random orders, and gives the mean
and the deviation over them of the loss's change and of the divergence (Kullback-Leibler, in nats a token, of the rounded
model's next-token probabilities from the unrounded one's), which chance moves less: a loss also falls when an error
happens to point the right way. The rounding is that of `models/compiler/src/quantize.rs`, written independently.

python compare_rounding.py [--checkpoint DIR] [--text FILE] [--tokens N] [--block N] [--orders N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

import checkpoint
from make_demo_data import read_jsonl

LOWEST, HIGHEST = -8, 7
COUNTS = {"mse": torch.ones_like, "wmse": torch.abs, "wmse-square": torch.square}


def rounded(blocks: Tensor, method: str) -> Tensor:
    """`[blocks, size]` weights as their codes give them back."""
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    best, best_gain = torch.zeros_like(blocks), torch.zeros_like(extreme)
    for attempt in [0] if method == "rtn" else range(-9, 10):
        codes = (blocks * ((LOWEST - 0.1 * attempt) / extreme)).round().clamp(LOWEST, HIGHEST)
        if method == "rtn":
            return (codes * extreme / LOWEST).nan_to_num()
        count = COUNTS[method](blocks)
        product, square = ((count * x * codes).sum(1, keepdim=True) for x in (blocks, codes))
        gain = product * product / square
        best = torch.where(gain > best_gain, codes * (product / square), best)
        best_gain = torch.maximum(gain.nan_to_num(), best_gain)
    return best.nan_to_num()


def round_matrix(matrix: Tensor, order: Tensor, block: int, method: str) -> Tensor:
    rows, columns = matrix.shape
    filled = torch.nn.functional.pad(matrix[:, order], (0, -columns % block))
    back = torch.empty_like(matrix)
    back[:, order] = rounded(filled.reshape(-1, block), method).reshape(rows, -1)[:, :columns]
    return back


def log_probabilities(model: torch.nn.Module, rows: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.log_softmax(model.logits(model.hidden(row[None, :-1]))[0], -1) for row in rows]


def loss(rows: list[Tensor], found: list[Tensor]) -> float:
    return -torch.cat([logs.gather(1, row[1:, None]) for row, logs in zip(rows, found)]).mean().item()


def divergence(whole: list[Tensor], found: list[Tensor]) -> float:
    return torch.cat([(a.exp() * (a - b)).sum(1) for a, b in zip(whole, found)]).mean().item()


def measured_rows(tokenizer, text: Path | None, tokens: int) -> list[Tensor]:
    here = Path(__file__).parent
    if text is None:
        rows = [checkpoint.render(tokenizer, row["messages"])[0] for row in read_jsonl(here / "demo/heldout.jsonl")]
    else:
        ids = tokenizer.encode(text.read_text()[: 8 * tokens], add_special_tokens=False).ids
        rows = [[checkpoint.EOT, *ids[at : at + 511]] for at in range(0, len(ids), 511)]
    taken, total = [], 0
    for row in rows:
        if total < tokens:
            taken.append(torch.tensor(row))
            total += len(row) - 1
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--text", type=Path, help="measured text [default: the demo's held-out questions]")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--orders", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that sums, and with them the last digits, do not depend on the machine
    model, tokenizer = checkpoint.load(options.checkpoint)
    rows = measured_rows(tokenizer, options.text, options.tokens)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    whole = log_probabilities(model, rows)
    changes: dict[str, list[tuple[float, float]]] = {"rtn": [], **{method: [] for method in COUNTS}}
    for order in range(options.orders):
        generator = torch.Generator().manual_seed(order)
        for method, found in changes.items():
            generator.manual_seed(order)
            state = dict(weights)
            for name, value in weights.items():
                if value.dim() == 2:
                    columns = torch.randperm(value.shape[1], generator=generator)
                    state[name] = round_matrix(value, columns, options.block, method)
            model.load_state_dict(state)
            logs = log_probabilities(model, rows)
            found.append((loss(rows, logs) - loss(rows, whole), divergence(whole, logs)))
    print(f"4 bits, block {options.block}, {options.orders} orders of columns, {sum(len(row) - 1 for row in rows)} tokens\n")
    print(f"{'method':<12}  {'loss difference':>16}  {'divergence':>16}")
    for method, found in changes.items():
        columns = [f"{mean(x):+.4f} ± {stdev(x):.4f}" for x in zip(*found)]
        print(f"{method:<12}  {columns[0]:>16}  {columns[1]:>16}")


if __name__ == "__main__":
    main()
