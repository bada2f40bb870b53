"""Prints the tables of adapters/README.md from what `train-reference --json` printed.

    python table_guard.py adapters/evaluation.jsonl adapters/by_source.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Reply-in-context and function-word tests: their safe rows sound unsafe by design.
CONTRASTIVE = ("diasafety", "hatecheck")
# No row of these was trained on, and none like it.
UNSEEN = ("advbench", "do-not-answer", "harmbench", "hatecheck")
# Much of what it asks sounds like any other question.
HARMLESS_SOUNDING = ("do-not-answer",)


def rate(r: dict) -> str:
    return "–" if not r["total"] else f"{100 * r['value']:.0f} % ({100 * r['low']:.0f}–{100 * r['high']:.0f})"


def together(what: str, counts: list[dict]) -> None:
    tp, fp, fn, tn = (sum(c[k] for c in counts) for k in ("true_positive", "false_positive", "false_negative", "true_negative"))
    if tp + fp and tp + fn and fp + tn:
        print(f"{what}: precision {tp / (tp + fp):.3f}, recall {tp / (tp + fn):.3f}, safe called unsafe {fp / (fp + tn):.3f} ({fp} of {fp + tn})")


def evaluated(event: dict) -> None:
    print(f"\n{event['file']}: expected calibration error {event['calibration_error']:.3f}, category named {rate(event['category_named'])}\n")
    print("| source | rows | precision | unsafe found | safe, called unsafe |\n|---|---|---|---|---|")
    for source, f in [*event["by_source"].items(), ("all", event["overall"])]:
        print(f"| {source} | {f['rows']} | {rate(f['precision'])} | {rate(f['recall'])} | {rate(f['false_positive_rate'])} |")
    print()
    for left_out in (CONTRASTIVE, CONTRASTIVE + HARMLESS_SOUNDING):
        kept = [f["counts"] for source, f in event["by_source"].items() if not source.startswith(left_out)]
        together(f"without {', '.join(left_out)}", kept)
    together(f"only {', '.join(UNSEEN)}", [f["counts"] for source, f in event["by_source"].items() if source.startswith(UNSEEN)])
    print()
    print("| category | unsafe rows | found |\n|---|---|---|")
    for category, found in event["found_by_category"].items():
        print(f"| {category} | {found['total']} | {rate(found)} |")


def main() -> None:
    events = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    for event in events:
        if event["event"] == "evaluate":
            evaluated(event)
    if left_out := [event for event in events if event["event"] == "left_out"]:
        print("\n| source left out | form | unsafe found | safe, called unsafe |\n|---|---|---|---|")
        share = lambda value: "–" if value is None else f"{100 * value:.0f} %"
        for e in left_out:
            print(f"| {e['source']} | {e['form']} | {share(e['found'])} of {e['unsafe_rows']} | {share(e['false_alarms'])} of {e['safe_rows']} |")


if __name__ == "__main__":
    main()
