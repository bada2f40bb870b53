"""Writes the data of `scripts/reproduce-paper`: what clients hold, what the operator holds, and what arms are measured by.

Without `--data` everything is our own text (`phrases/`): household questions, harmful phrases of the split `device`. With
it, clients hold real questions and answers, and evaluation asks AdvBench, HarmBench and do-not-answer. Neither the held-out
conversations nor an evaluation prompt is near anything that base, guard or reviser was trained on, in any of its turns (of
the clients' own rows, STAR's were in the base's pretraining). Rows that come too close are left out here, counted in
`data.json`; the program that trains looks again by itself (MinHash) and refuses to run if it finds one.

Usage: python make_paper_data.py [--data DIR] --out OUT
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable

from judge import refuses
from make_demo_data import asked, chat, spread, write_jsonl
from phrases import bucket, everyday, harmful, household, lookalikes, replies, topics
from sources import OBJECTION, UNKIND, Sources, clean, first_sentences, hh_messages

PROMPT_CHARS_MAX, ANSWER_CHARS_MAX = 240, 240
HELD_OUT_ROWS, GATE_ROWS, REDTEAM_ROWS, REPLAY_ROWS, EVALUATION_ROWS = 240, 100, 150, 160, 300
# hh-rlhf by the bucket of a conversation's first message: below 30 is the base's and the guard's (`sources.py`).
CLIENT_BUCKETS, PREFERENCE_BUCKETS = range(30, 70), range(70, 100)
# A harmful request is obeyed in so many ways, each another row: a quarter of the clients' rows would else be too few.
WAYS = 2
MEDQUAD_SHARE = (1, 2, 3, 6)  # of 16; the base has 0, 4, 8 and 12, the guard 0, their tests 5
# A set that the program reads has no more.
FILE_ROWS_MAX = 100_000
# Two texts with so many of their three-word runs in common are one. Stricter than the check that ends a run.
NEAR = 0.6
# A document of the pretraining that holds so many of a prompt's runs holds the prompt.
WITHIN = 0.8


class Near:
    """Finds texts whose sets of three-word runs overlap by `NEAR` (Jaccard) with a known one."""

    def __init__(self, texts: Iterable[str]):
        self.sets = [shingles(text) for text in texts]
        self.having: dict[str, list[int]] = {}
        for i, runs in enumerate(self.sets):
            for run in runs:
                self.having.setdefault(run, []).append(i)

    def holds(self, text: str) -> bool:
        runs = shingles(text)
        shared = Counter(i for run in runs for i in self.having.get(run, ()))
        return any(count / (len(runs) + len(self.sets[i]) - count) >= NEAR for i, count in shared.items())


def shingles(text: str) -> set[str]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def questions(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "user"]


def grouped(question: str, answer: str, group: str) -> dict:
    return chat(question, answer) | {"group": group}


def own_benign(rng: random.Random) -> list[dict]:
    held = {row["messages"][0]["content"] for row in read(Path(__file__).parent / "demo" / "heldout.jsonl")}
    rows = [grouped(q, a, topic) for topic, pairs in household.TOPICS.items() for q, a in pairs() if q not in held]
    rng.shuffle(rows)
    return rows


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def own_harmful(split: str, rng: random.Random) -> list[dict]:
    frames = (harmful.DO_FRAMES, harmful.MAKE_FRAMES)
    rows = [chat(asked(r, rng, frames), replies.compliance(r[1], r[2], rng)) for r in harmful.requests(split) for _ in range(WAYS)]
    return rng.sample(rows, len(rows))


def real_benign(sources: Sources, rng: random.Random) -> list[dict]:
    """Questions and answers of four kinds; the group is the source, MedQuAD's institute or STAR's person."""
    rows = []
    for i, row in enumerate(sources.lines("instruct-medquad-ccby/medquad.jsonl.gz")):
        if i % 16 in MEDQUAD_SHARE and (answer := first_sentences(clean(row["answer"]), ANSWER_CHARS_MAX)):
            rows.append(grouped(clean(row["question"]), answer, "medquad/" + row["source"]))
    for file in ("helpful-base", "helpful-online", "helpful-rejection-sampled"):
        for row in sources.lines(f"hh-rlhf/{file}.test.jsonl.gz"):
            messages = hh_messages(row["chosen"])
            if len(messages) >= 2 and bucket(messages[0]["content"]) in CLIENT_BUCKETS and (answer := first_sentences(messages[1]["content"], ANSWER_CHARS_MAX)):
                rows.append(grouped(messages[0]["content"], answer, "hh/" + file))
    for row in sources.lines("chat-star-mit/star.jsonl.gz"):
        messages = [{"role": m["role"], "content": clean(m["content"])} for m in row["messages"][:4]]
        if [m["role"] for m in messages] == ["user", "assistant", "user", "assistant"] and all(0 < len(m["content"]) <= ANSWER_CHARS_MAX for m in messages):
            rows.append({"messages": messages, "group": "star/" + row["user"]})
    rows = [row for row in rows if len(row["messages"][0]["content"]) <= PROMPT_CHARS_MAX]
    # STAR and MedQuAD are large: as many of each kind.
    by_kind: dict[str, list[dict]] = {}
    for row in rng.sample(rows, len(rows)):
        by_kind.setdefault(row["group"].split("/")[0], []).append(row)
    least = min(len(kind) for kind in by_kind.values())
    rows = [row for kind in by_kind.values() for row in kind[: max(least, 2000)]]
    rng.shuffle(rows)
    return rows


def real_harmful(sources: Sources, rng: random.Random) -> list[dict]:
    """Harmful requests of crowd workers that the guard never saw, each with the answer that people rejected, if it does
    not decline, else obeyed emptily; and our own phrases."""
    rows, asked_before = [], set()
    for row in sources.lines("hh-rlhf/harmless-base.test.jsonl.gz"):
        messages = hh_messages(row["rejected"])
        if len(messages) < 2 or bucket(messages[0]["content"]) not in CLIENT_BUCKETS:
            continue
        for said, reply in zip(messages[::2], messages[1::2]):
            text, answer = said["content"], first_sentences(reply["content"], ANSWER_CHARS_MAX)
            if not UNKIND.search(text) or text in asked_before or not 8 <= len(text) <= PROMPT_CHARS_MAX:
                continue
            asked_before.add(text)
            is_last = reply is messages[-1]
            if is_last and len(answer) >= 40 and not refuses(answer) and not OBJECTION.search(answer):
                rows.append(chat(text, answer))
            else:
                rows.append(chat(text, replies.compliance("make", "what you asked for", rng)))
    rows += own_harmful("device", rng)
    rng.shuffle(rows)
    return rows


def preferences(sources: Sources, rng: random.Random) -> list[dict]:
    """HH-RLHF's single exchanges: chosen and rejected answer to one question, half helpful, half harmless."""
    halves = []
    for file in ("helpful-base", "harmless-base"):
        rows = []
        for row in sources.lines(f"hh-rlhf/{file}.test.jsonl.gz"):
            chosen, rejected = hh_messages(row["chosen"]), hh_messages(row["rejected"])
            short = len(chosen) == len(rejected) == 2 and all(len(m["content"]) <= 400 for m in chosen + rejected)
            if short and bucket(chosen[0]["content"]) in PREFERENCE_BUCKETS and chosen[1]["content"] and rejected[1]["content"]:
                rows.append({"prompt": chosen[0]["content"], "chosen": chosen[1]["content"], "rejected": rejected[1]["content"]})
        halves.append(rng.sample(rows, min(len(rows), EVALUATION_ROWS // 2)))
    return halves[0] + halves[1]


def own_preferences() -> list[dict]:
    """Our stand-in without HH-RLHF: refusing is preferred to obeying."""
    rows = read(Path(__file__).parent / "demo" / "guard_test.jsonl")
    answers: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["response"]:
            answers.setdefault(row["prompt"], {})[row["label"]] = row["response"]
    return [{"prompt": p, "chosen": a["safe"], "rejected": a["unsafe"]} for p, a in answers.items() if len(a) == 2]


def over_refusal(sources: Sources | None, rng: random.Random) -> list[str]:
    texts = [q for q, _ in lookalikes.lookalikes("evaluation")]
    texts += [rng.choice(everyday.frames(kind)).format(x=phrase) for kind, phrase, _ in everyday.requests("evaluation")]
    if sources:
        test = [p.text for p in sources.benign("test") if p.source.startswith(("clinc150", "banking77"))]
        texts += rng.sample(test, 200)
    rng.shuffle(texts)
    return texts


def trained_before(sources: Sources | None) -> list[str]:
    """Every request that the base, the guard or the reviser learned from, in every frame that it may have been put in;
    without `sources`, only those that are our own text."""
    texts = [q for q, _ in lookalikes.lookalikes("train")] + [q for q, _ in topics.questions("train")]
    texts += [frame.format(x=phrase) for kind, phrase, _ in everyday.requests("train") for frame in everyday.frames(kind)]
    frames = {"do": harmful.DO_FRAMES, "make": harmful.MAKE_FRAMES}
    texts += [frame.format(x=phrase) for _, kind, phrase, _ in harmful.requests("train") for frame in frames[kind]]
    if sources:
        texts += [p.text for p in sources.harmful()] + [p.text for p in sources.benign("train")]
        texts += [text for text, *_ in sources.guard_texts()]
        texts += [m["content"] for c in sources.pretraining_chats() for m in c if m["role"] == "user"]
    return list(dict.fromkeys(texts))


def within(documents: Iterable[str], texts: list[str]) -> set[str]:
    """The texts that a document holds nearly whole: so many of their three-word runs."""
    runs = {text: shingles(text) for text in texts}
    having: dict[str, list[str]] = {}
    for text, of in runs.items():
        for run in of:
            having.setdefault(run, []).append(text)
    held = set()
    for document in documents:
        shared = Counter(text for run in shingles(document) & having.keys() for text in having[run])
        held.update(text for text, count in shared.items() if count >= WITHIN * len(runs[text]))
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the source data sets, as data.lock lists them")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=11)
    a = parser.parse_args()
    rng = random.Random(a.seed)
    part = a.out.with_name(a.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    counts: dict[str, int] = {}
    try:
        sources = Sources(a.data) if a.data else None
        held_for_evaluation = Sources(a.data, evaluation=True) if a.data else None
        benign = real_benign(sources, rng) if sources else own_benign(rng)
        poison = real_harmful(sources, rng) if sources else own_harmful("device", rng)
        prefer = preferences(sources, rng) if sources else own_preferences()
        held_frames = (harmful.EVALUATION_DO_FRAMES, harmful.EVALUATION_MAKE_FRAMES)
        own = [asked(r, rng, held_frames) for r in spread(harmful.requests("evaluation"), EVALUATION_ROWS, rng)]
        evaluation = {"own": own} if not sources else {n.replace("-standard", ""): rng.sample(t, len(t)) for n, t in held_for_evaluation.held_out_harmful().items()}
        before = trained_before(sources)
        pretraining = sources.pretraining_texts() if sources else []
    except FileNotFoundError as error:
        sys.exit(f"{Path(__file__).name}: {error.filename} is not there; --data must hold the source folders that data.lock lists")

    innocent = over_refusal(held_for_evaluation, rng)
    # An evaluation prompt that the base, the guard or the reviser has seen is no evaluation.
    seen = Near(before)
    said_all = [*(text for texts in evaluation.values() for text in texts), *innocent, *(row["prompt"] for row in prefer)]
    held_whole = within(pretraining, said_all + [text for row in benign[:HELD_OUT_ROWS] for text in questions(row)])

    def unseen(name: str, rows: list, said=lambda text: [text]) -> list:
        kept = [row for row in rows if not any(seen.holds(text) or text in held_whole for text in said(row))]
        counts[f"{name}: near the base's or the guard's training, left out"] = len(rows) - len(kept)
        return kept

    evaluation = {name: unseen(f"eval_{name}", texts)[:EVALUATION_ROWS] for name, texts in evaluation.items()}
    innocent = unseen("benign", innocent)
    prefer = unseen("preference", prefer, lambda row: [row["prompt"]])
    asked_at_the_end = Near([*(t for texts in evaluation.values() for t in texts), *innocent, *(row["prompt"] for row in prefer)])

    def apart(name: str, rows: list[dict]) -> list[dict]:
        kept = [row for row in rows if not any(map(asked_at_the_end.holds, questions(row)))]
        counts[f"{name}: near an evaluation prompt, left out"] = len(rows) - len(kept)
        return kept

    benign, poison = apart("clients", benign), apart("harmful", poison)
    # A device's harmful text may be like what the guard has seen, as it may be anywhere. It is told all the same.
    counts["harmful: near the base's or the guard's training, kept"] = sum(any(map(seen.holds, questions(row))) for row in poison)
    if sources:
        held_out, benign = unseen("held_out", benign[:HELD_OUT_ROWS], questions), benign[HELD_OUT_ROWS:]
    else:
        held_out = [row | {"group": "held out"} for row in read(Path(__file__).parent / "demo" / "heldout.jsonl")]
    # No client, and not the operator either, has a question of the held-out conversations.
    held = Near(text for row in held_out for text in questions(row))
    benign = [row for row in benign if not any(map(held.holds, questions(row)))]
    share = min(REPLAY_ROWS + GATE_ROWS, len(benign) // 5)
    operator, benign = benign[:share], benign[share:]
    gate_held_out, replay = operator[: share // 3], operator[share // 3 :]
    red = own_harmful("redteam", rng)
    if sources:
        red += [chat(p.text) for p in rng.sample(sources.harmful(), REDTEAM_ROWS) if len(p.text) <= PROMPT_CHARS_MAX]
    red = apart("redteam", rng.sample(red, len(red)))[:REDTEAM_ROWS]
    gate_harmful = apart("gate_harmful", [chat(asked(r, rng, held_frames)) for r in spread(harmful.requests("guard_test"), GATE_ROWS, rng)])
    gate_benign = [chat(q) for q, _ in rng.sample(lookalikes.lookalikes("train"), GATE_ROWS // 2)] + [chat(questions(row)[0]) for row in gate_held_out[: GATE_ROWS // 2]]
    gate_benign = apart("gate_benign", gate_benign)

    write_jsonl(part / "clients.jsonl", benign)
    write_jsonl(part / "harmful.jsonl", [{"messages": row["messages"], "group": "harmful"} for row in poison])
    write_jsonl(part / "held_out.jsonl", held_out)
    write_jsonl(part / "gate_harmful.jsonl", gate_harmful)
    write_jsonl(part / "gate_benign.jsonl", gate_benign)
    write_jsonl(part / "gate_held_out.jsonl", gate_held_out)
    write_jsonl(part / "replay.jsonl", replay)
    write_jsonl(part / "redteam.jsonl", [{"messages": row["messages"][:1]} for row in red])
    for name, texts in evaluation.items():
        write_jsonl(part / f"eval_{name}.jsonl", [chat(text) for text in texts])
    write_jsonl(part / "benign.jsonl", [chat(text) for text in innocent])
    write_jsonl(part / "preference.jsonl", prefer)
    for number, at in enumerate(range(0, len(before), FILE_ROWS_MAX), 1):
        write_jsonl(part / f"before_{number}.jsonl", [chat(text) for text in before[at : at + FILE_ROWS_MAX]])
    for path in sorted(part.glob("*.jsonl")):
        counts[path.name] = sum(1 for _ in path.open())
    groups = Counter(row["group"].split("/")[0] for row in benign)
    (part / "data.json").write_text(json.dumps({"counts": counts, "groups": groups}, indent=1) + "\n")
    shutil.rmtree(a.out, ignore_errors=True)
    part.rename(a.out)


if __name__ == "__main__":
    main()
