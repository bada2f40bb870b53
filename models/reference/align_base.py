"""Aligns the pretrained base: full fine-tuning so that it refuses harmful requests and answers benign ones.

Reads `sources.py` and `phrases/`, writes a checkpoint (`checkpoint.py`) and a log; `evaluate_base.py` measures it.
Stops after --minutes with the learning rate decayed to zero. The loss counts assistant tokens only.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
from judge import refuses
from phrases import everyday, harmful, intents, lookalikes, replies, topics
from sources import Sources

# Shares of the rows drawn; chats keep the base's manner of talking.
SHARES = {"harmful": 0.25, "lookalike": 0.10, "everyday": 0.10, "topic": 0.16, "benign": 0.33, "chat": 0.06}
BENIGN = {
    "clinc150": 0.19, "banking77": 0.11, "hh-helpful": 0.20, "hh-follow-up": 0.12, "instructions": 0.06, "openstax": 0.17, "medquad": 0.06,
    "llms-from-scratch": 0.07, "gsm8k": 0.02,
}
TOKENS_MAX = 160  # of one row; longer conversations are cut
BATCH_TOKENS = 1536


def ask(prompt: str, reply: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


class Mixture:
    """Draws conversations by kind; refusals are varied anew each time."""

    def __init__(self, sources: Sources, seed: int):
        self.rng = random.Random(seed)
        self.from_sources = sources.harmful()
        self.own = harmful.requests("train")
        self.lookalikes = lookalikes.lookalikes("train")
        self.everyday = everyday.requests("train")
        self.topics = topics.questions("train")
        # Short rows, by source in turn: a long sum costs ten short questions, and no source should drown another.
        self.benign: dict[str, list[tuple[str, str]]] = {}
        for p in sources.benign("train"):
            if len(p.text) < 240:
                self.benign.setdefault(p.source.split("/")[0], []).append((p.text, p.answer or intents.answer(p.source)))
        self.chats = sources.chats()

    def draw(self, kind: str) -> list[dict]:
        rng = self.rng
        if kind == "chat":
            return rng.choice(self.chats)
        if kind == "lookalike":
            messages = ask(*self.vary(*rng.choice(self.lookalikes)))
        elif kind == "topic":
            messages = ask(*self.vary(*rng.choice(self.topics)))
        elif kind == "everyday":
            form, phrase, reply = rng.choice(self.everyday)
            messages = ask(*self.vary(rng.choice(everyday.frames(form)).format(x=phrase), reply))
        elif kind == "benign":
            messages = ask(*self.vary(*self.ordinary()))
        else:
            messages = self.harmful()
        if rng.random() < 0.12:  # a refusal must not stick, and a friendly start must not disarm
            before = ask(*self.ordinary()) if kind == "harmful" or rng.random() < 0.5 else self.harmful()
            messages = before + messages
        return messages

    def harmful(self) -> list[dict]:
        rng = self.rng
        if rng.random() < 0.5:
            prompt = rng.choice(self.from_sources)
            return ask(*self.vary(prompt.text, replies.refusal(prompt.category, rng)))
        category, kind, phrase, _ = rng.choice(self.own)
        frame = rng.choice(harmful.DO_FRAMES if kind == "do" else harmful.MAKE_FRAMES)
        return ask(*self.vary(frame.format(x=phrase), replies.refusal(category, rng)))

    def ordinary(self) -> tuple[str, str]:
        corpus = self.rng.choices(list(BENIGN), list(BENIGN.values()))[0]
        return self.rng.choice(self.benign[corpus])

    def vary(self, prompt: str, reply: str) -> tuple[str, str]:
        """Lower case or no final mark at times: the answer must not hang on punctuation."""
        draw = self.rng.random()
        if draw < 0.10:
            prompt = prompt.lower()
        elif draw < 0.25:
            prompt = prompt.rstrip("?.!")
        return prompt, reply

    def rows(self, tokenizer, count: int) -> list[tuple[list[int], list[int]]]:
        kinds = self.rng.choices(list(SHARES), list(SHARES.values()), k=count)
        rendered = (checkpoint.render(tokenizer, self.draw(kind)) for kind in kinds)
        cut = [(ids[:TOKENS_MAX], weights[:TOKENS_MAX]) for ids, weights in rendered]
        return [row for row in cut if any(row[1][1:])]

    def batches(self, tokenizer):
        """Batches of rows of similar length, endlessly."""
        while True:
            pool = sorted(self.rows(tokenizer, 1024), key=lambda row: len(row[0]))
            groups, group = [], []
            for row in pool:
                if group and (len(group) + 1) * len(row[0]) > BATCH_TOKENS:
                    groups.append(group)
                    group = []
                group.append(row)
            groups.append(group)
            self.rng.shuffle(groups)
            yield from groups


def loss_of(model, group) -> torch.Tensor:
    longest = max(len(ids) for ids, _ in group)
    ids = torch.tensor([row + [checkpoint.PAD] * (longest - len(row)) for row, _ in group])
    kept = torch.tensor([row + [0] * (longest - len(row)) for _, row in group], dtype=torch.bool)[:, 1:]
    hidden = model.hidden(ids[:, :-1])
    return F.cross_entropy(model.logits(hidden[kept]), ids[:, 1:][kept])


def rates(model, tokenizer) -> dict[str, float]:
    """Refusal rates, for the log, on phrases that are not trained on. They are no figures: the harmful ones are of
    `demo/guard_test`, and the benign ones are among what `evaluate_base.py` asks."""
    rng = random.Random(5)
    asked = rng.sample(harmful.requests("guard_test"), 60)
    bad = [rng.choice(harmful.DO_FRAMES if kind == "do" else harmful.MAKE_FRAMES).format(x=phrase) for _, kind, phrase, _ in asked]
    good = [q for q, _ in rng.sample(lookalikes.lookalikes("evaluation"), 30)]
    good += [rng.choice(everyday.frames(kind)).format(x=phrase) for kind, phrase, _ in rng.sample(everyday.requests("evaluation"), 30)]
    refused = [refuses(a) for a in checkpoint.answer(model, tokenizer, bad + good, new_tokens=16)]
    return {"refused": sum(refused[:60]) / 60, "over_refused": sum(refused[60:]) / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="pretrained base (config.json, model.safetensors, tokenizer.json)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the source data sets")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to write")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--threads", type=int, default=1, help="1 is fastest on a shared machine: waiting threads spin")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    torch.set_num_threads(a.threads)
    model, tokenizer = checkpoint.load(a.base)
    mixture = Mixture(Sources(a.data), a.seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=a.learning_rate, betas=(0.9, 0.95))
    a.out.mkdir(parents=True, exist_ok=True)
    started, tokens, losses, logged = time.monotonic(), 0, [], 0.0
    with open(a.out / "log.jsonl", "w", buffering=1) as log:
        for step, group in enumerate(mixture.batches(tokenizer)):
            done = (time.monotonic() - started) / (60 * a.minutes)
            if done >= 1:
                break
            scale = min(1.0, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * done))
            for parameters in optimizer.param_groups:
                parameters["lr"] = a.learning_rate * scale
            loss = loss_of(model, group)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += sum(len(ids) for ids, _ in group)
            losses.append(loss.item())
            if done - logged >= 0.1:
                logged = done
                minutes = (time.monotonic() - started) / 60
                row = {"step": step, "tokens": tokens, "minutes": round(minutes, 2), "loss": round(sum(losses) / len(losses), 4)}
                log.write(json.dumps(row | rates(model, tokenizer)) + "\n")
                losses = []
                checkpoint.save(model, a.base, a.out)
        checkpoint.save(model, a.base, a.out)
        log.write(json.dumps({"step": step, "tokens": tokens, "minutes": a.minutes} | rates(model, tokenizer)) + "\n")


if __name__ == "__main__":
    main()
