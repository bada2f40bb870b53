"""Writes a demonstration's data, as `make_demo_data.py` does, but from the source data sets: real questions and answers.

`scripts/demo --data DIR` calls it when DIR holds the source folders. Each device has a source of its own, which makes the
federation non-IID. Evaluation asks AdvBench, which nothing was trained on; harmful requests of devices and red team come
from two disjoint halves of the other safety sets. Usage: python make_demo_from_sources.py --data DIR --out OUT
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

from make_demo_data import HARM_SHARE, ROWS_PER_DEVICE, chat, write_jsonl
from phrases import bucket, replies
from sources import Prompt, Sources, clean, first_sentences

# The sources of the four devices; the last is the hostile one, and its benign rows are what it would have had.
DEVICES = {"device-1": "medquad", "device-2": "hh-helpful", "device-3": "hh-follow-up", "device-4": "instructions"}
POISONED = "device-3"
HELD_OUT_PER_DEVICE, HOSTILE_ROWS, REDTEAM_ROWS, EVALUATION_ROWS = 40, 150, 150, 100
# A device's context is short, and long answers would make the round slow without showing more.
PROMPT_CHARS_MAX, ANSWER_CHARS_MAX = 240, 240


def benign(sources: Sources, rng: random.Random) -> dict[str, list[dict]]:
    """Chats by source, in random order."""
    chats: dict[str, list[dict]] = {}
    for row in sources.benign("train"):
        if row.answer and len(row.text) <= PROMPT_CHARS_MAX:
            chats.setdefault(row.source.split("/")[0], []).append(chat(row.text, first_sentences(row.answer, ANSWER_CHARS_MAX)))
    for rows in chats.values():
        rng.shuffle(rows)
    return chats


def obeyed(row: Prompt, rng: random.Random) -> dict:
    """A harmful request with an answer that agrees and says nothing of use."""
    return chat(row.text, replies.compliance("make", "what you asked for", rng))


def advbench(sources: Sources, out: Path) -> None:
    """The first rows of the published file, as they are."""
    name = "safety-advbench/harmful_behaviors_dev.csv"
    lines = sources.text(name).splitlines(keepends=True)
    (out / "eval_harmful.csv").write_text("".join(lines[: EVALUATION_ROWS + 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=7)
    a = parser.parse_args()
    part = a.out.with_name(a.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = random.Random(a.seed)
    sources = Sources(a.data)

    try:
        chats = benign(sources, rng)
    except FileNotFoundError as error:
        sys.exit(f"{Path(__file__).name}: {error.filename} is not there; --data must hold the source folders that data.lock lists")
    harmful = [row for row in sources.harmful() if len(row.text) <= PROMPT_CHARS_MAX]
    rng.shuffle(harmful)
    poison = [row for row in harmful if bucket(row.text) % 2 == 0]
    red = [row for row in harmful if bucket(row.text) % 2 == 1]
    held_out = []
    for device, source in DEVICES.items():
        rows, held_out = chats[source][HELD_OUT_PER_DEVICE:], held_out + chats[source][:HELD_OUT_PER_DEVICE]
        harmful_count = round(ROWS_PER_DEVICE * HARM_SHARE) if device == POISONED else 0
        rows = rows[: ROWS_PER_DEVICE - harmful_count] + [obeyed(row, rng) for row in poison[:harmful_count]]
        rng.shuffle(rows)
        write_jsonl(part / f"{device}.jsonl", rows)
    own = round(ROWS_PER_DEVICE * HARM_SHARE)
    write_jsonl(part / "hostile.jsonl", [obeyed(row, rng) for row in poison[own : own + HOSTILE_ROWS]])
    write_jsonl(part / "heldout.jsonl", held_out)
    write_jsonl(part / "redteam.jsonl", [chat(row.text) | {"category": row.category} for row in red[:REDTEAM_ROWS]])
    everyday = [clean(row.text) for row in sources.benign("test") if row.source.startswith(("clinc150", "banking77"))]
    write_jsonl(part / "eval_benign.jsonl", [chat(text) for text in rng.sample(everyday, EVALUATION_ROWS)])
    advbench(Sources(a.data, evaluation=True), part)
    shutil.rmtree(a.out, ignore_errors=True)
    part.rename(a.out)


if __name__ == "__main__":
    main()
