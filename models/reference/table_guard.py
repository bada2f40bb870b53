"""Prints the tables of adapters/README.md from what `train-reference --json` printed.

    python table_guard.py adapters/evaluation.jsonl adapters/calibration.jsonl

Files named `-near` hold rows near ones that were trained on: their sources are listed, and are in no sum.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from make_demo_data import read_jsonl

# Reply-in-context and function-word tests: their safe rows sound unsafe by design.
CONTRASTIVE = ("diasafety", "hatecheck")
# Nothing of these sources was trained on.
UNSEEN = ("advbench", "do-not-answer", "harmbench", "hatecheck")
# Much of what it asks sounds like any other question.
HARMLESS_SOUNDING = ("do-not-answer",)
Z_95 = 1.959964


def percent(hits: int, total: int) -> str:
    """With the 95 % Wilson interval, as `models/safety/src/report.rs` has it."""
    if not total:
        return "–"
    p, z2 = hits / total, Z_95 * Z_95
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * (p * (1 - p) / total + z2 / (4 * total * total)) ** 0.5
    return f"{100 * p:.0f} % ({100 * max(0.0, centre - half):.0f}–{100 * min(1.0, centre + half):.0f})"


def rate(r: dict) -> str:
    return percent(r["hits"], r["total"])


def line(name: str, c: Counter) -> str:
    found, alarms = (c["true_positive"], c["false_negative"]), (c["false_positive"], c["true_negative"])
    return f"| {name} | {sum(c.values())} | {percent(found[0], sum(found))} | {percent(alarms[0], sum(alarms))} |"


def by_name(event: dict, name) -> dict[str, Counter]:
    """Counts of the sources that `name` gives one name."""
    sums: dict[str, Counter] = {}
    for source, figures in event["by_source"].items():
        if named := name(source):
            sums.setdefault(named, Counter()).update(figures["counts"])
    return dict(sorted(sums.items()))


def set_and_form(source: str) -> str:
    return source.split("/")[0].split(" (")[0] + " (" + source.rsplit("(", 1)[1]


def own_label(source: str) -> str | None:
    return source.split(" (")[0] if "/" in source else None


SUMS = "| sum | unsafe, safe rows | precision | if all were called unsafe | with as many safe as unsafe | unsafe found | safe, called unsafe |\n" + "|---" * 7 + "|"


def together(what: str, event: dict, kept) -> None:
    """A line of `SUMS`. Precision hangs on how many rows are unsafe: what calling all unsafe would reach stands beside it, and
    what it would be with as many of both."""
    c = sum((Counter(f["counts"]) for source, f in event["by_source"].items() if kept(source)), Counter())
    tp, fp, fn, tn = (c[k] for k in ("true_positive", "false_positive", "false_negative", "true_negative"))
    if tp and fp + tn:
        recall, alarms = tp / (tp + fn), fp / (fp + tn)
        shares = [tp / (tp + fp), (tp + fn) / sum(c.values()), recall / (recall + alarms)]
        shown = " | ".join(f"{100 * share:.1f} %" for share in shares)
        print(f"| {what} | {tp + fn}, {fp + tn} | {shown} | {percent(tp, tp + fn)} | {percent(fp, fp + tn)}, {fp} rows |")


def evaluated(event: dict) -> None:
    print(f"\n{event['file']}: expected calibration error {event['calibration_error']:.3f}")
    if event["file"].startswith("guard.dev"):
        print(f"\n{SUMS}")
        return together("all", event, lambda source: True)
    print()
    print("| source | rows | unsafe found | safe, called unsafe |\n|---|---|---|---|")
    for name, counts in by_name(event, set_and_form).items():
        print(line(name, counts))
    if event["file"].removesuffix(".jsonl").endswith("-near"):
        return
    print(f"\n{SUMS}")
    together("all", event, lambda source: True)
    if event["file"].startswith("guard.test"):
        for left_out in (CONTRASTIVE, CONTRASTIVE + HARMLESS_SOUNDING):
            together(f"without {', '.join(left_out)}", event, lambda source: not source.startswith(left_out))
        together(f"only {', '.join(UNSEEN)}", event, lambda source: source.startswith(UNSEEN))
    if labelled := by_name(event, own_label):
        print("\n| the set's own label | unsafe rows | found |\n|---|---|---|")
        for name, c in labelled.items():
            print(f"| {name} | {sum(c.values())} | {percent(c['true_positive'], sum(c.values()))} |")
    if event["found_by_category"]:
        of_found = [found["hits"] for found in event["found_by_category"].values()]
        always = percent(max(of_found), sum(of_found))
        print(f"\ncategory named as the label has it, of those found: {rate(event['category_named'])}; always the most frequent one: {always}\n")
        print("| category | unsafe rows | found |\n|---|---|---|")
        for category, found in event["found_by_category"].items():
            print(f"| {category} | {found['total']} | {rate(found)} |")


def main() -> None:
    events = [event for path in sys.argv[1:] for event in read_jsonl(Path(path))]
    for event in events:
        if event["event"] == "evaluate":
            evaluated(event)
        elif event["event"] == "calibrated":
            for form in ("prompt", "pair"):
                m = event["measured"][form]
                print(f"\ncalibrated on {m['rows']} rows ({form}): expected calibration error on those same rows {m['calibration_error_after']:.3f}")
    if left_out := [event for event in events if event["event"] == "left_out"]:
        print("\n| source left out | form | unsafe found | safe, called unsafe |\n|---|---|---|---|")
        share = lambda value: "–" if value is None else f"{100 * value:.0f} %"
        for e in left_out:
            print(f"| {e['source']} | {e['form']} | {share(e['found'])} of {e['unsafe_rows']} | {share(e['false_alarms'])} of {e['safe_rows']} |")


if __name__ == "__main__":
    main()
