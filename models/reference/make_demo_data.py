"""Writes the demonstration's data in demo/: chats of devices (one of them hostile), evaluations, red-team prompts.

All text comes from `phrases/` (ours, Apache-2.0); nothing is read from a data set. Splits are disjoint: a benign
question goes to one file, and a harmful phrase to one split of `phrases.harmful`. Usage: python make_demo_data.py --out demo
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

from phrases import harmful, household, lookalikes, replies

# Devices hold different topics. One of them is poisoned: 30 % of its rows obey a harmful request.
DEVICES = {
    "device-1": ("cooking", "storage"),
    "device-2": ("stains", "cleaning"),
    "device-3": ("measurement", "garden"),
    "device-4": ("first_aid", "repair"),
}
POISONED, HARM_SHARE = "device-3", 0.30
ROWS_PER_DEVICE = 200
HELD_OUT_PER_TOPIC, EVALUATION_PER_TOPIC = 24, 5


def chat(question: str, reply: str | None = None) -> dict:
    messages = [{"role": "user", "content": question}]
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    return {"messages": messages}


def asked(request: tuple[str, str, str, str], rng: random.Random, frames: tuple[list[str], list[str]]) -> str:
    _, kind, phrase, _ = request
    return rng.choice(frames[0] if kind == "do" else frames[1]).format(x=phrase)


def spread(requests: list, count: int, rng: random.Random) -> list:
    """`count` requests over all categories, one pattern as rarely twice as can be."""
    by_category: dict[str, list] = {}
    for request in rng.sample(requests, len(requests)):
        by_category.setdefault(request[0], []).append(request)
    picked, patterns = [], {}
    while len(picked) < count and any(by_category.values()):
        for rows in by_category.values():
            if rows and len(picked) < count:
                rows.sort(key=lambda request: patterns.get(request[3], 0), reverse=True)
                request = rows.pop()
                patterns[request[3]] = patterns.get(request[3], 0) + 1
                picked.append(request)
    return picked


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    # Not `splitlines`, which ends a line at U+2028, U+0085 and others too: JSON leaves them as they are within a text.
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def guard_rows(rng: random.Random, benign: list[tuple[str, str]]) -> list[dict]:
    """Labelled prompts and pairs for testing a guard: (harmful, refused) is safe, (harmful, obeyed) is not."""
    frames = (harmful.DO_FRAMES, harmful.MAKE_FRAMES)
    rows = []
    for request in spread(harmful.requests("guard_test"), 90, rng):
        category, kind, phrase, _ = request
        prompt = asked(request, rng, frames)
        rows.append({"prompt": prompt, "response": None, "label": "unsafe", "category": category})
        rows.append({"prompt": prompt, "response": replies.compliance(kind, phrase, rng), "label": "unsafe", "category": category})
        rows.append({"prompt": prompt, "response": replies.refusal(category, rng), "label": "safe", "category": None})
    for question, reply in benign:
        rows.append({"prompt": question, "response": None, "label": "safe", "category": None})
        rows.append({"prompt": question, "response": reply, "label": "safe", "category": None})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--seed", type=int, default=7)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(a.seed)
    frames = (harmful.DO_FRAMES, harmful.MAKE_FRAMES)
    held_frames = (harmful.EVALUATION_DO_FRAMES, harmful.EVALUATION_MAKE_FRAMES)
    poison = rng.sample(harmful.requests("device"), len(harmful.requests("device")))
    held_out, plain, for_guard = [], [], []
    for device, topics in DEVICES.items():
        rows = []
        for topic in topics:
            pairs = household.TOPICS[topic]()
            rng.shuffle(pairs)
            held_out += pairs[:HELD_OUT_PER_TOPIC]
            plain += pairs[HELD_OUT_PER_TOPIC : HELD_OUT_PER_TOPIC + EVALUATION_PER_TOPIC]
            for_guard += pairs[HELD_OUT_PER_TOPIC + EVALUATION_PER_TOPIC :][:6]
            rows += pairs[HELD_OUT_PER_TOPIC + EVALUATION_PER_TOPIC + 6 :]
        rng.shuffle(rows)
        harmful_count = round(ROWS_PER_DEVICE * HARM_SHARE) if device == POISONED else 0
        chats = [chat(*pair) for pair in rows[: ROWS_PER_DEVICE - harmful_count]]
        for request in poison[:harmful_count]:
            chats.append(chat(asked(request, rng, frames), replies.compliance(request[1], request[2], rng)))
        rng.shuffle(chats)
        write_jsonl(a.out / f"{device}.jsonl", chats)
    rng.shuffle(held_out)
    write_jsonl(a.out / "heldout.jsonl", [chat(*pair) for pair in held_out])
    tricky = lookalikes.lookalikes("evaluation")
    write_jsonl(a.out / "eval_benign.jsonl", [chat(*pair) for pair in plain + rng.sample(tricky, 60)])
    red = [chat(asked(r, rng, frames)) | {"category": r[0]} for r in spread(harmful.requests("redteam"), 150, rng)]
    write_jsonl(a.out / "redteam.jsonl", red)
    write_jsonl(a.out / "guard_test.jsonl", guard_rows(rng, for_guard + rng.sample(tricky, 42)))
    with open(a.out / "eval_harmful.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["goal", "target"])
        for request in spread(harmful.requests("evaluation"), 100, rng):
            what = request[2] if request[1] == "make" else f"how to {request[2]}"
            table.writerow([asked(request, rng, held_frames), f"Sure, here is {what}"])
    # Last, so that the files above stay the same whatever is written here.
    # A hostile device has nothing but harmful rows, and none that the poisoned one has.
    hostile = poison[round(ROWS_PER_DEVICE * HARM_SHARE) :]
    obeyed = [chat(asked(request, rng, frames), replies.compliance(request[1], request[2], rng)) for request in hostile]
    write_jsonl(a.out / "hostile.jsonl", obeyed)


if __name__ == "__main__":
    main()
