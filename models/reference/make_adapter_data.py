"""Writes the training, development and test rows of the two adapters: the guard and the reviser.

Reads `sources.py` and `phrases/`; the rows go to `--out` and are not part of the repository. `train-reference` (Rust)
reads them. Guard rows: prompt, response or null, label, category or null, source. Reviser rows: prompt, response,
category or null, principle, critique, revision. Rows are shuffled, so that any prefix is a fair sample. The test file
holds sources that neither training nor development sees. Test rows whose prompt is near one that anything was trained on,
in any of its frames, are in `-near` files: figures come from the others.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from make_demo_data import read_jsonl, write_jsonl
from make_paper_data import Near, trained_before
from phrases import bucket, everyday, harmful, intents, lookalikes, replies, topics
from sources import Prompt, Sources, first_sentences

DEV_PERCENT = 8
TEXT_MAX = 420  # characters of a prompt or a response: about 120 tokens
CAPS = {"clinc150": 2200, "banking77": 700, "gsm8k": 300, "medquad": 500, "llms-from-scratch": 700, "hh-helpful": 1500, "hh-follow-up": 700, "openstax": 2000, "diasafety": 700, "openai-moderation": 1300}
# Agreement that is harmless when the request is: the guard must not judge by "Sure, here is" alone.
FRIENDLY = ["Sure, here is how: {x}", "Of course! {x}", "Sure, here is a step by step plan: {x}", "{x}", "{x}", "{x}"]


def guard_row(prompt: str, response: str | None, label: str, category: str | None, source: str) -> dict:
    return {"prompt": prompt, "response": response, "label": label, "category": category, "source": source}


def short(text: str | None) -> bool:
    return text is None or 0 < len(text) <= TEXT_MAX


def harmful_prompts(sources: Sources, rng: random.Random) -> list[tuple[str, str, str, tuple[str, str]]]:
    """(prompt, category, source, (kind, phrase)): the phrase is what an obeying answer names."""
    rows = []
    for p in sources.harmful():
        if short(p.text):
            rows.append((p.text, p.category, p.source, ("make", rng.choice(["what you asked for", "a step by step plan", "the answer to your question", "some help"]))))
    for category, kind, phrase, _ in harmful.requests("train"):
        for frame in rng.sample(harmful.DO_FRAMES if kind == "do" else harmful.MAKE_FRAMES, 2):
            rows.append((frame.format(x=phrase), category, "own", (kind, phrase)))
    return rows


def capped(rows: list[Prompt], rng: random.Random) -> list[Prompt]:
    rng.shuffle(rows)
    count: Counter = Counter()
    kept = []
    for p in rows:
        source = p.source.split("/")[0]
        count[source] += 1
        if count[source] <= CAPS.get(source, 10**9) and len(p.text) <= TEXT_MAX:
            kept.append(p)
    return kept


def benign_pairs(sources: Sources, rng: random.Random) -> list[tuple[str, str, str]]:
    """(prompt, answer, source) that are safe."""
    rows = [(p.text, first_sentences(p.answer or intents.answer(p.source), 300), p.source.split("/")[0]) for p in capped(sources.benign("train"), rng)]
    rows += [(question, reply, "lookalike") for question, reply in lookalikes.lookalikes("train") for _ in range(4)]
    for kind, phrase, reply in everyday.requests("train"):
        rows += [(frame.format(x=phrase), reply, "everyday") for frame in rng.sample(everyday.frames(kind), min(3, len(everyday.frames(kind))))]
    rows += [(question, reply, "topics") for question, reply in rng.sample(topics.questions("train"), 1200)]
    return [row for row in rows if row[1]]


def guard_rows(sources: Sources, rng: random.Random) -> list[dict]:
    rows = []
    for prompt, category, source, (kind, phrase) in harmful_prompts(sources, rng):
        draw = rng.random()
        if draw < 0.55:
            rows.append(guard_row(prompt, None, "unsafe", category, source))
        if draw > 0.40:
            answer = replies.compliance(kind, phrase, rng)
            opening = answer[: answer.index(".") + 1]  # "Sure, here is …" alone agrees as much
            rows.append(guard_row(prompt, opening if rng.random() < 0.25 else answer, "unsafe", category, source))
        if draw < 0.20 or draw > 0.70:
            rows.append(guard_row(prompt, replies.refusal(category, rng), "safe", None, source))
    for prompt, reply, source in benign_pairs(sources, rng):
        draw = rng.random()
        if draw < 0.55:
            rows.append(guard_row(prompt, None, "safe", None, source))
        if draw > 0.45:
            rows.append(guard_row(prompt, rng.choice(FRIENDLY).format(x=reply), "safe", None, source))
        if draw > 0.97:  # refusing too much is a nuisance, not a danger
            rows.append(guard_row(prompt, replies.refusal(rng.choice(list(replies.REASON)), rng), "safe", None, source))
    labelled = list(sources.guard_texts())
    rng.shuffle(labelled)
    count: Counter = Counter()
    for prompt, response, label, category, source in labelled:
        if short(prompt) and short(response):
            count[source] += 1
            if count[source] <= CAPS.get(source, 10**9):
                rows.append(guard_row(prompt, response, label, category, source))
    rng.shuffle(rows)
    return rows


def guard_test_rows(sources: Sources, rng: random.Random) -> list[dict]:
    """Sources that training does not touch, plus the benign sets' own test splits."""
    evaluation = Sources(sources.data, evaluation=True)
    rows = [guard_row(*row) for row in evaluation.held_out_guard_texts() if short(row[0]) and short(row[1])]
    by_source: dict[str, list[dict]] = {}
    for row in rng.sample(rows, len(rows)):
        by_source.setdefault(row["source"].split("/")[0], []).append(row)
    rows = [row for group in by_source.values() for row in group[:400]]
    benign = [p for p in capped(evaluation.benign("test"), rng) if p.source.split("/")[0] in ("clinc150", "banking77")]
    rows += [guard_row(p.text, None, "safe", None, p.source.split("/")[0] + "-test") for p in benign[:500]]
    rows += [guard_row(*[m["content"] for m in chat], "safe", None, "hh-helpful-held-out") for chat in evaluation.held_out_chats() if all(short(m["content"]) for m in chat)][:150]
    for question, reply in lookalikes.lookalikes("evaluation"):
        rows.append(guard_row(question, None, "safe", None, "lookalike-held-out"))
        rows.append(guard_row(question, reply, "safe", None, "lookalike-held-out"))
    for kind, phrase, reply in everyday.requests("evaluation"):
        rows.append(guard_row(rng.choice(everyday.frames(kind)).format(x=phrase), reply, "safe", None, "everyday-held-out"))
    rng.shuffle(rows)
    return rows


def reviser_rows(sources: Sources, rng: random.Random) -> list[dict]:
    rows = []
    for prompt, category, _, (kind, phrase) in harmful_prompts(sources, rng):
        rows.append({
            "prompt": prompt, "response": replies.compliance(kind, phrase, rng), "category": category,
            "principle": replies.PRINCIPLE_OF[category], "critique": replies.critique(category, rng), "revision": replies.revision(category),
        })
    benign = [row for row in benign_pairs(sources, rng) if len(row[1]) < 160]
    for prompt, reply, _ in rng.sample(benign, len(rows) // 6):  # a false alarm: the answer stays
        rows.append({
            "prompt": prompt, "response": reply, "category": None, "principle": rng.choice(list(replies.PRINCIPLES)),
            "critique": rng.choice(replies.FINE), "revision": reply,
        })
    rng.shuffle(rows)
    return rows


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training and development rows: a prompt is wholly in one of them."""
    dev = [row for row in rows if bucket("dev " + row["prompt"]) < DEV_PERCENT]
    return [row for row in rows if bucket("dev " + row["prompt"]) >= DEV_PERCENT], dev


def apart(rows: list[dict], seen: Near) -> tuple[list[dict], list[dict]]:
    """Rows that are far from what `seen` holds, and rows that are near, by their prompt alone."""
    near = {row["prompt"]: seen.holds(row["prompt"]) for row in rows}
    return [row for row in rows if not near[row["prompt"]]], [row for row in rows if near[row["prompt"]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=3)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    sources, rng = Sources(a.data), random.Random(a.seed)
    files: dict[str, list[dict]] = {}
    files["guard.train"], files["guard.dev"] = split(guard_rows(sources, rng))
    test = guard_test_rows(sources, rng)
    files["reviser.train"], files["reviser.dev"] = split(reviser_rows(sources, rng))
    trained = trained_before(sources)
    before = Near(trained, by_words=False)
    files["guard.test"], files["guard.test-near"] = apart(test, before)
    demo = [row | {"source": "demo"} for row in read_jsonl(Path(__file__).parent / "demo" / "guard_test.jsonl")]
    files["guard.demo"], files["guard.demo-near"] = apart(demo, before)
    # A calibration judged on the rows it was fitted on looks too good: half of the development rows fit, of the other half
    # those judge that are not near a training row.
    half = {row["prompt"]: bucket("half " + row["prompt"], 2) for row in files["guard.dev"]}
    files["guard.dev-fit"] = [row for row in files["guard.dev"] if half[row["prompt"]]]
    judging = [row for row in files["guard.dev"] if not half[row["prompt"]]]
    judging, files["guard.dev-near"] = apart(judging, Near(dict.fromkeys(row["prompt"] for row in files["guard.train"]), by_words=False))
    files["guard.dev-prompts"] = [row for row in judging if row["response"] is None]
    files["guard.dev-pairs"] = [row for row in judging if row["response"] is not None]
    for name, texts in Sources(a.data, evaluation=True).held_out_harmful().items():
        same = len(set(texts) & set(trained))
        print(json.dumps({"set": name, "prompts": len(texts), "near training": sum(map(before.holds, texts)), "the same text": same}))
    for name, rows in files.items():
        write_jsonl(a.out / f"{name}.jsonl", rows)
        print(json.dumps({"file": name, "rows": len(rows), "labels": Counter(row.get("label", "revise") for row in rows)}))


if __name__ == "__main__":
    main()
