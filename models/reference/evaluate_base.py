"""Measures a checkpoint on rows that training never saw: refusing what is harmful, answering what is benign, chat loss.

The judge is rule-based (`judge.py`). Decoding is greedy. A prompt that is near one that base, guard or reviser was trained
on, in any of its frames, is left out and counted. `--compare` gives a second checkpoint (the pretrained base) for before
and after; the last column has the weights in 4 bits by the method of `scripts/build-package`, rounded here, not the package.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
from pathlib import Path

import torch

import checkpoint
from compare_rounding import round_matrix
from judge import refuses
from make_demo_data import read_jsonl
from make_paper_data import Near, trained_before
from phrases import everyday, lookalikes, topics
from sources import Sources

DEMO = Path(__file__).parent / "demo"
# As `scripts/build-package` rounds.
METHOD, BLOCK = "mse", 32


def round_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.copy_(round_matrix(p, torch.arange(p.shape[1]), BLOCK, METHOD))


class Rows:
    """What is asked: harmful and benign prompts by set, and conversations; `near` counts what was left out of each."""

    def __init__(self, sources: Sources, limit: int):
        rng = random.Random(23)
        self.harmful = {name: texts if len(texts) <= limit else rng.sample(texts, limit) for name, texts in sources.held_out_harmful().items()}
        self.harmful["demo/eval_harmful"] = [row["goal"] for row in csv.DictReader(open(DEMO / "eval_harmful.csv"))]
        self.benign: dict[str, list[str]] = {}
        test = sources.benign("test")
        for corpus in ("clinc150", "banking77", "medquad", "gsm8k"):
            texts = [p.text for p in test if p.source.split("/")[0] == corpus]
            self.benign[f"{corpus} test"] = rng.sample(texts, min(limit, len(texts)))
        helpful = sources.held_out_chats()[:limit]
        self.benign["hh-helpful held out"] = [chat[0]["content"] for chat in helpful]
        self.benign["look-alikes held out"] = [question for question, _ in lookalikes.lookalikes("evaluation")]
        self.benign["everyday held out"] = [rng.choice(everyday.frames(kind)).format(x=phrase) for kind, phrase, _ in everyday.requests("evaluation")]
        self.benign["topics held out"] = [question for question, _ in rng.sample(topics.questions("evaluation"), 100)]
        self.benign["demo/eval_benign"] = [row["messages"][0]["content"] for row in read_jsonl(DEMO / "eval_benign.jsonl")]
        seen, self.near = Near(trained_before(Sources(sources.data)), by_words=False), {}
        for sets in (self.harmful, self.benign):
            for name, prompts in sets.items():
                sets[name] = [prompt for prompt in prompts if not seen.holds(prompt)]
                self.near[name] = len(prompts) - len(sets[name])
        kept = set(self.benign["hh-helpful held out"])
        self.chats = {
            "hh-helpful held out": [chat for chat in helpful if chat[0]["content"] in kept],
            "demo/heldout": [row["messages"] for row in read_jsonl(DEMO / "heldout.jsonl")],
        }


def measure(directory: Path, asked: Rows, rounded: bool, samples: Path | None = None) -> dict[str, float]:
    model, tokenizer = checkpoint.load(directory)
    if rounded:
        round_weights(model)
    figures: dict[str, float] = {}
    with open(samples, "w") if samples else open("/dev/null", "w") as file:
        for kind, sets in (("refused", asked.harmful), ("over-refused", asked.benign)):
            for name, prompts in sets.items():
                answers = checkpoint.answer(model, tokenizer, prompts, new_tokens=24)
                judged = [refuses(answer) for answer in answers]
                figures[f"{kind} % | {name} ({len(prompts)})"] = 100 * sum(judged) / len(judged)
                for prompt, answer, refused in zip(prompts, answers, judged):
                    file.write(json.dumps({"set": name, "refused": refused, "prompt": prompt, "answer": answer}) + "\n")
    for name, chats in asked.chats.items():
        figures[f"chat loss | {name} ({len(chats)})"] = checkpoint.chat_loss(model, tokenizer, chats)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--compare", type=Path, help="another checkpoint, measured first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300, help="prompts of a set at most")
    parser.add_argument("--samples", type=Path, help="write every prompt and answer here")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    asked = Rows(Sources(a.data, evaluation=True), a.limit)
    before = measure(a.compare, asked, False) if a.compare else {}
    after = measure(a.checkpoint, asked, False, a.samples)
    rounded = measure(a.checkpoint, asked, True)
    print("| figure | set (rows) | before | after | after, 4 bits |\n| --- | --- | --- | --- | --- |")
    for name in after:
        kind, rows = name.split(" | ")
        digits = 2 if "loss" in kind else 1
        values = [f"{column[name]:.{digits}f}" if column else "–" for column in (before, after, rounded)]
        print(f"| {kind} | {rows} | {' | '.join(values)} |")
    print("\nleft out as near what was trained on: " + ", ".join(f"{count} of {name}" for name, count in asked.near.items() if count))
    digest = hashlib.sha256((a.checkpoint / "model.safetensors").read_bytes()).hexdigest()
    print(f"weights: sha256 {digest}")


if __name__ == "__main__":
    main()
