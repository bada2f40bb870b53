"""Measures a checkpoint on rows that training never saw: refusing what is harmful, answering what is benign, chat loss.

The judge is rule-based (`judge.py`). Decoding is greedy. `--compare` gives a second checkpoint (the pretrained base) for
before and after; `--bits 4` rounds the weights as a 4-bit package does (blocks of 32, symmetric).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

import torch

import checkpoint
from judge import refuses
from phrases import everyday, lookalikes, topics
from sources import Sources

DEMO = Path(__file__).parent / "demo"


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


def round_to_bits(model: torch.nn.Module, bits: int, block: int = 32) -> None:
    """Replaces every matrix by its nearest values on a symmetric grid, one scale a block of a row."""
    top = 2 ** (bits - 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                blocks = p.view(p.shape[0], -1, block)
                extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
                scale = torch.where(extreme == 0, torch.ones_like(extreme), extreme / -top)
                p.copy_(((blocks / scale).round().clamp(-top, top - 1) * scale).view_as(p))


def measure(directory: Path, sources: Sources, limit: int, bits: int, samples: Path | None = None) -> dict[str, float]:
    model, tokenizer = checkpoint.load(directory)
    if bits:
        round_to_bits(model, bits)
    rng = random.Random(23)
    harmful = {name: texts if len(texts) <= limit else rng.sample(texts, limit) for name, texts in sources.held_out_harmful().items()}
    harmful["demo/eval_harmful"] = [row["goal"] for row in csv.DictReader(open(DEMO / "eval_harmful.csv"))]
    benign: dict[str, list[str]] = {}
    test = sources.benign("test")
    for corpus in ("clinc150", "banking77", "medquad", "gsm8k"):
        texts = [p.text for p in test if p.source.split("/")[0] == corpus]
        benign[f"{corpus} test"] = rng.sample(texts, min(limit, len(texts)))
    helpful = sources.held_out_chats()
    benign["hh-helpful held out"] = [chat[0]["content"] for chat in helpful][:limit]
    benign["look-alikes held out"] = [question for question, _ in lookalikes.lookalikes("evaluation")]
    benign["everyday held out"] = [rng.choice(everyday.frames(kind)).format(x=phrase) for kind, phrase, _ in everyday.requests("evaluation")]
    benign["topics held out"] = [question for question, _ in rng.sample(topics.questions("evaluation"), 100)]
    benign["demo/eval_benign"] = [row["messages"][0]["content"] for row in rows_of("eval_benign.jsonl")]
    figures: dict[str, float] = {}
    with open(samples, "w") if samples else open("/dev/null", "w") as file:
        for kind, sets in (("refused", harmful), ("over-refused", benign)):
            for name, prompts in sets.items():
                answers = checkpoint.answer(model, tokenizer, prompts, new_tokens=24)
                judged = [refuses(answer) for answer in answers]
                figures[f"{kind} % | {name} ({len(prompts)})"] = 100 * sum(judged) / len(judged)
                for prompt, answer, refused in zip(prompts, answers, judged):
                    file.write(json.dumps({"set": name, "refused": refused, "prompt": prompt, "answer": answer}) + "\n")
    figures[f"chat loss | hh-helpful held out ({min(limit, len(helpful))})"] = checkpoint.chat_loss(model, tokenizer, helpful[:limit])
    figures["chat loss | demo/heldout (192)"] = checkpoint.chat_loss(model, tokenizer, [row["messages"] for row in rows_of("heldout.jsonl")])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--compare", type=Path, help="another checkpoint, measured first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="prompts of a set at most")
    parser.add_argument("--bits", type=int, default=0, choices=(0, 4, 8), help="round the weights first")
    parser.add_argument("--samples", type=Path, help="write every prompt and answer here")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    sources = Sources(a.data, evaluation=True)
    before = measure(a.compare, sources, a.limit, a.bits) if a.compare else {}
    after = measure(a.checkpoint, sources, a.limit, a.bits, a.samples)
    print("| figure | set (rows) | before | after |\n| --- | --- | --- | --- |")
    for name, value in after.items():
        kind, rows = name.split(" | ")
        digits = 2 if "loss" in kind else 1
        earlier = f"{before[name]:.{digits}f}" if before else "–"
        print(f"| {kind} | {rows} | {earlier} | {value:.{digits}f} |")


if __name__ == "__main__":
    main()
