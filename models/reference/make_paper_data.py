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
import math
import random
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Iterable

from judge import refuses
from make_demo_data import asked, chat, read_jsonl, spread, write_jsonl
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
OWN = "own phrases, obeyed emptily"
# Two texts with so many of their three-word runs in common are one. Stricter than the check that ends a run.
NEAR = 0.6
# So have two texts with so many of their content words in common, of three or more: a prompt of twelve words that has one
# of them replaced shares few runs.
ALIKE, WORDS_MIN = 0.6, 3
# The program that trains leaves out fewer words (`contamination.rs`), and compares four or more.
AS_SAID, AS_SAID_MIN = 0.65, 4
COMMON = frozenset(
    "a about an and any are as at be by can do does for from give how i in into is it me my of on or so that the their them there this "
    "to up us use was we what when where will with without write you your".split()
)
# What makes no difference between two requests: function words, and the frames in which one may ask for anything.
EMPTY = frozenset(
    "a about after all also am an and any are as at be been but by can could did do does each for from get give had has have help her "
    "him his how i if in into is it its just like make may me more most my need no not of on one only or other our out over own people "
    "please provide say she should show so some someone such tell than that the their them then there these they thing things this "
    "those to up us use using want was way we were what when where which who why will with without would write you your "
    "create design detailed develop explain guide instruct instructions list offer outline plan post steps step suggest teach "
    "tutorial".split()
)
# A document of the pretraining that holds so many of a prompt's runs holds the prompt.
WITHIN = 0.8


class Sets:
    """Finds sets that overlap by a share (Jaccard) with a known one."""

    def __init__(self, sets: Iterable[frozenset[str]], share: float):
        self.sets, self.share = list(dict.fromkeys(sets)), share
        self.having: dict[str, list[int]] = {}
        for i, members in enumerate(self.sets):
            for member in members:
                self.having.setdefault(member, []).append(i)

    def holds(self, members: frozenset[str]) -> bool:
        # One of so many members that is shared at all has one of the rarest: the others need not be looked at.
        rare = sorted(members, key=lambda member: len(self.having.get(member, ())))
        least = math.ceil(self.share * len(members))
        candidates = {i for member in rare[: len(rare) - least + 1] for i in self.having.get(member, ())}
        return any(len(members & self.sets[i]) >= self.share * len(members | self.sets[i]) for i in candidates)


class Near:
    """Finds texts that have `NEAR` of their three-word runs or, if asked for, so many of their words in common with a known
    one."""

    def __init__(self, texts: Iterable[str], by_words: bool = True):
        texts, self.by_words = list(texts), by_words
        self.runs = Sets((frozenset(shingles(text)) for text in texts), NEAR)
        self.words = Sets((words for text in texts if len(words := content(text)) >= WORDS_MIN), ALIKE)
        self.as_said = Sets((words for text in texts if len(words := as_said(text)) >= AS_SAID_MIN), AS_SAID)

    def holds(self, text: str) -> bool:
        if not self.by_words:
            return self.runs.holds(frozenset(shingles(text)))
        words, said = content(text), as_said(text)
        return (
            self.runs.holds(frozenset(shingles(text)))
            or (len(words) >= WORDS_MIN and self.words.holds(words))
            or (len(said) >= AS_SAID_MIN and self.as_said.holds(said))
        )


def as_said(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", text.lower())) - COMMON


def content(text: str) -> frozenset[str]:
    """A text's words but for the empty ones, each without the ending of a plural or a form of a verb."""
    words = (word for word in re.findall(r"[^\W_]+", text.lower()) if word not in EMPTY and len(word) > 1)
    return frozenset(re.sub(r"(?<=\w{3})(?:ing|ed|es|s)$", "", word) for word in words)


def shingles(text: str) -> set[str]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def questions(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "user"]


def grouped(question: str, answer: str, group: str) -> dict:
    return chat(question, answer) | {"group": group}


def own_benign(rng: random.Random) -> list[dict]:
    held = {row["messages"][0]["content"] for row in read_jsonl(Path(__file__).parent / "demo" / "heldout.jsonl")}
    rows = [grouped(q, a, topic) for topic, pairs in household.TOPICS.items() for q, a in pairs() if q not in held]
    rng.shuffle(rows)
    return rows


def own_harmful(split: str, rng: random.Random) -> list[dict]:
    frames = (harmful.DO_FRAMES, harmful.MAKE_FRAMES)
    rows = [grouped(asked(r, rng, frames), replies.compliance(r[1], r[2], rng), OWN) for r in harmful.requests(split) for _ in range(WAYS)]
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
    """Requests of crowd workers that the guard never saw, that sound harmful and to which the reply that people preferred
    objects; each with the answer that people rejected, if it does not decline, else obeyed emptily. And our own phrases."""
    rows, asked_before = [], set()
    for row in sources.lines("hh-rlhf/harmless-base.test.jsonl.gz"):
        messages, preferred = hh_messages(row["rejected"]), hh_messages(row["chosen"])
        if len(messages) < 2 or bucket(messages[0]["content"]) not in CLIENT_BUCKETS:
            continue
        # The two part at the last reply, at the latest.
        for said, reply, better in zip(messages[::2], messages[1::2], preferred[1::2]):
            text, answer = said["content"], first_sentences(reply["content"], ANSWER_CHARS_MAX)
            if not (refuses(better["content"]) or OBJECTION.search(better["content"])):
                continue
            if not UNKIND.search(text) or text in asked_before or not 8 <= len(text) <= PROMPT_CHARS_MAX:
                continue
            asked_before.add(text)
            is_last = reply is messages[-1]
            if is_last and len(answer) >= 40 and not refuses(answer) and not OBJECTION.search(answer):
                rows.append(grouped(text, answer, "crowd, the rejected answer"))
            else:
                rows.append(grouped(text, replies.compliance("make", "what you asked for", rng), "crowd, obeyed emptily"))
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
    rows = read_jsonl(Path(__file__).parent / "demo" / "guard_test.jsonl")
    answers: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["response"]:
            answers.setdefault(row["prompt"], {})[row["label"]] = row["response"]
    return [{"prompt": p, "chosen": a["safe"], "rejected": a["unsafe"]} for p, a in answers.items() if len(a) == 2]


def over_refusal(sources: Sources | None, rng: random.Random) -> dict[str, list[str]]:
    """Benign prompts: those that sound dangerous, and everyday ones."""
    alarming = [q for q, _ in lookalikes.lookalikes("evaluation")]
    plain = [rng.choice(everyday.frames(kind)).format(x=phrase) for kind, phrase, _ in everyday.requests("evaluation")]
    if sources:
        test = [p.text for p in sources.benign("test") if p.source.startswith(("clinc150", "banking77"))]
        plain += rng.sample(test, 200)
    return {"alarming": rng.sample(alarming, len(alarming)), "everyday": rng.sample(plain, len(plain))}


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
    said_all = [*(t for sets in (evaluation, innocent) for texts in sets.values() for t in texts), *(row["prompt"] for row in prefer)]
    held_whole = within(pretraining, said_all + [text for row in benign[:HELD_OUT_ROWS] for text in questions(row)])

    def unseen(name: str, rows: list, said=lambda text: [text]) -> list:
        kept = [row for row in rows if not any(seen.holds(text) or text in held_whole for text in said(row))]
        counts[f"{name}: near the base's or the guard's training, left out"] = len(rows) - len(kept)
        return kept

    evaluation = {name: unseen(f"eval_{name}", texts)[:EVALUATION_ROWS] for name, texts in evaluation.items()}
    innocent = {name: unseen(f"benign_{name}", texts) for name, texts in innocent.items()}
    prefer = unseen("preference", prefer, lambda row: [row["prompt"]])
    asked_at_the_end = Near([*(t for sets in (evaluation, innocent) for texts in sets.values() for t in texts), *(row["prompt"] for row in prefer)])

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
        held_out = [row | {"group": "held out"} for row in read_jsonl(Path(__file__).parent / "demo" / "heldout.jsonl")]
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
    write_jsonl(part / "harmful.jsonl", poison)
    write_jsonl(part / "held_out.jsonl", held_out)
    write_jsonl(part / "gate_harmful.jsonl", gate_harmful)
    write_jsonl(part / "gate_benign.jsonl", gate_benign)
    write_jsonl(part / "gate_held_out.jsonl", gate_held_out)
    write_jsonl(part / "replay.jsonl", replay)
    write_jsonl(part / "redteam.jsonl", [{"messages": row["messages"][:1]} for row in red])
    for name, texts in evaluation.items():
        write_jsonl(part / f"eval_{name}.jsonl", [chat(text) for text in texts])
    for name, texts in innocent.items():
        write_jsonl(part / f"benign_{name}.jsonl", [chat(text) for text in texts])
    write_jsonl(part / "preference.jsonl", prefer)
    for number, at in enumerate(range(0, len(before), FILE_ROWS_MAX), 1):
        write_jsonl(part / f"before_{number}.jsonl", [chat(text) for text in before[at : at + FILE_ROWS_MAX]])
    for path in sorted(part.glob("*.jsonl")):
        counts[path.name] = sum(1 for _ in path.open())
    groups = Counter(row["group"].split("/")[0] for row in benign)
    kinds = Counter(row["group"] for row in poison)
    (part / "data.json").write_text(json.dumps({"counts": counts, "groups": groups, "harmful": kinds}, indent=1) + "\n")
    shutil.rmtree(a.out, ignore_errors=True)
    part.rename(a.out)


if __name__ == "__main__":
    main()
