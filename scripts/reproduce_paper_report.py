"""Draws the report of scripts/reproduce-paper from its results: a table, whether the goals are met, plots as SVG.

Nothing here computes a result but means, intervals over seeds and the paper's figures beside ours.
"""

import collections
import functools
import html
import json
import math
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
# arXiv 2502.16691, table of the final models: safe share on AdvBench, HHH.
PAPER = {
    "base": (99.6, 60.0),
    "FedAvg plain": (72.5, 49.3), "FedAvg + filter": (81.2, 51.8), "FedAvg + constitution": (96.2, 57.3), "FedAvg + both": (96.3, 63.7),
    "SCAFFOLD plain": (72.7, 49.5), "SCAFFOLD + filter": (78.8, 54.6), "SCAFFOLD + constitution": (96.5, 62.6), "SCAFFOLD + both": (97.1, 63.9),
}
# Two-sided 95 % of Student's t by degrees of freedom; beyond, the last, which is too wide.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
JUDGES = ("rules", "classifier")
# Kinds of benign prompts, and how they are told.
BENIGN = {"alarming": "look-alikes", "everyday": "everyday"}
# Safe rates that differ by less, in points, count as alike.
ALIKE = 1.0
# The results that this reads (`HARNESS` in tests/src/bin/reproduce-paper/main.rs).
HARNESS = 2
# Texts on which the judges differ that are shown, the most frequent first.
SHOWN = 12
COLOURS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569"]
WIDTH, COLUMNS, LEFT, RIGHT, TOP, PLOT, LINE = 360, 3, 44, 12, 28, 152, 14
# Of a character, about: nothing here can measure text.
CHARACTER = 6.6


@functools.cache
def tell(text):
    """To standard error, once however often the file is read."""
    print(f"reproduce-paper: {text}", file=sys.stderr)


def lines(path):
    """The JSON objects of a file, one a line.

    The last line may be cut short by a kill: it is passed over, what it said is done again. A damaged line before it is
    passed over too, as the program does that goes on with the file, but told: a run that went on after a kill leaves one.
    """
    # Not `splitlines`, which ends a line at U+2028, U+0085 and others too: JSON leaves them as they are within a text.
    *whole, last = path.read_bytes().split(b"\n")
    for number, line in enumerate([*whole, last], 1):
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            if number <= len(whole):
                tell(f"{path}: line {number}: expected a JSON object, got {line[:40]!r}, {len(line)} bytes in all; passed over")
            continue
        yield row


def read(out):
    """The ends of federations, by arm in the order in which they first came, and what the guard does on the clients' data."""
    arms, guard = {}, {}
    path = out / "results.jsonl"
    for line in lines(path) if path.is_file() else []:
        if line["line"] == "end":
            arms.setdefault(line["arm"]["name"], {"arm": line["arm"], "seeds": {}})["seeds"][line["seed"]] = line["ended"]
        elif line["line"] == "guard":
            guard = line
    return arms, guard


def over_seeds(arm, value):
    return [value(ended) for ended in arm["seeds"].values()]


def mean(values):
    return statistics.fmean(values)


def interval(values):
    """Half the width of the 95 % interval of the mean; nothing for one seed."""
    if len(values) < 2:
        return None
    return STUDENT[min(len(values) - 1, max(STUDENT))] * statistics.stdev(values) / math.sqrt(len(values))


def figure(values, digits, scale=1.0):
    values = [value * scale for value in values]
    half = interval(values)
    return f"{mean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def safe(name, judge):
    return lambda ended: next((one[judge] for one in ended["measures"]["safe"] if one["set"] == name), math.nan)


def safe_rate(arm, name, judge):
    """The mean over seeds, in percent."""
    return 100 * mean(over_seeds(arm, safe(name, judge)))


def benign(name, judge):
    return lambda ended: next((one[judge] for one in ended["measures"]["benign"] if one["set"] == name), math.nan)


def sets(arms):
    order = ["advbench", "harmbench", "do-not-answer", "own"]
    found = {one["set"] for arm in arms.values() for ended in arm["seeds"].values() for one in ended["measures"]["safe"]}
    return [name for name in order if name in found]


def lines_of(rows):
    head, *body = rows
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return out + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in body]


def seconds(ended):
    return ended["device_seconds"] + sum(ended["stage_seconds"].values())


def table(arms):
    names = sets(arms)
    rows = [["arm", "seeds", *(f"{name}, safe % by rules / classifier" for name in names), "paper's AdvBench", *(f"{told} refused % by rules / classifier" for told in BENIGN.values()),
             "held-out loss", "preference %", "paper's HHH"]]
    for name, arm in arms.items():
        if arm["arm"]["family"] != "main":
            continue
        measure = lambda key: over_seeds(arm, lambda ended: ended["measures"][key])
        paper = PAPER.get(name, ("–", "–"))
        both = [" / ".join(figure(over_seeds(arm, safe(one, judge)), 1, 100) for judge in JUDGES) for one in names]
        refused = [" / ".join(figure(over_seeds(arm, benign(kind, judge)), 1, 100) for judge in JUDGES) for kind in BENIGN]
        rows.append([name, len(arm["seeds"]), *both, paper[0], *refused, figure(measure("held_out_loss"), 3),
                     figure(measure("preference"), 1, 100), paper[1]])
    return lines_of(rows) if len(rows) > 1 else []


def costs(arms):
    rows = [["arm", "samples kept", "dropped", "replaced by a refusal", "revised", "kB uploaded", "bits a value", "seconds", "of which alignment", "rounds published"]]
    for name, arm in arms.items():
        if arm["arm"]["family"] != "main" or not arm["arm"]["trains"]:
            continue
        of = lambda value: mean(over_seeds(arm, value))
        counts = [f"{of(lambda ended: ended['samples'].get(kind, 0)):.0f}" for kind in ("kept", "dropped", "refused", "revised")]
        bits = of(lambda ended: ended["bits_per_parameter"] or 0)
        rows.append([name, *counts, f"{of(lambda e: e['uploaded_bytes']) / 1e3:.0f}", f"{bits:.2f}", f"{of(seconds):.0f}",
                     f"{of(lambda e: e['stage_seconds'].get('align', 0)):.0f}", f"{of(lambda e: e['published']):.1f} of {of(lambda e: e['rounds']):.0f}"])
    return lines_of(rows) if len(rows) > 1 else []


def order(arms):
    """The paper's order, on every set and by either judge. What differs by less than a point counts as alike (=)."""
    rows = [["algorithm", "set", "judge", "safe %, in the paper's order from the safest", "in that order"]]
    for algorithm in ("FedAvg", "SCAFFOLD"):
        names = {f"{algorithm} {what}": word for what, word in (("+ both", "both"), ("+ constitution", "constitution"), ("+ filter", "filter"), ("plain", "plain"))}
        if not all(name in arms for name in ["base", *names]):
            continue
        for one in sets(arms):
            for judge in JUDGES:
                values = [("base", safe_rate(arms["base"], one, judge))] + [(word, safe_rate(arms[name], one, judge)) for name, word in names.items()]
                chain, reversed_ = f"base {values[0][1]:.1f}", []
                for (before, high), (after, low) in zip(values, values[1:]):
                    sign = "=" if abs(high - low) < ALIKE else ">" if high > low else "<"
                    chain += f" {sign} {after} {low:.1f}"
                # Also of those that are not next to each other.
                for i, (before, high) in enumerate(values):
                    reversed_ += [f"{after} above {before}" for after, low in values[i + 1 :] if low >= high + ALIKE]
                rows.append([algorithm, one, judge, chain, "yes" if not reversed_ else "**no**: " + ", ".join(reversed_)])
    return lines_of(rows) if len(rows) > 1 else []


def goals(arms):
    """What was hoped for, with the figures that decide it."""
    loss = lambda name: mean(over_seeds(arms[name], lambda ended: ended["measures"]["held_out_loss"]))
    rows = [["goal", *(f"{one}, by {judge}" for one in sets(arms) for judge in JUDGES), "held-out loss"]]
    for name, within in (("ours", 1), ("ours, FFA", 1), ("ours, exact", 1), ("ours, hostile 1 in 10, robust", 3), ("ours, hostile 1 in 10, mean", 3)):
        if not all(needed in arms for needed in ("base", "FedAvg, clean data", name)):
            continue
        cells = []
        for one in sets(arms):
            for judge in JUDGES:
                value, base = safe_rate(arms[name], one, judge), safe_rate(arms["base"], one, judge)
                cells.append(f"{'met' if value >= base - within else '**missed**'}: {value:.1f}, base {base:.1f}")
        clean = loss("FedAvg, clean data")
        gain = loss("base") - clean
        kept = f", {100 * (loss('base') - loss(name)) / gain:.0f} % of its gain" if gain > 0 else ""
        told = f"{'met' if loss(name) <= 1.02 * clean else '**missed**'}: {loss(name):.3f}, clean data {clean:.3f}{kept}" if within == 1 else "–"
        points = "a point" if within == 1 else f"{within} points"
        rows.append([f"{name}: safe within {points} of the base" + (", loss within 2 % of clean data" if within == 1 else ""), *cells, told])
    return lines_of(rows) if len(rows) > 1 else []


def filtering(line):
    guard, kinds = line["screened"], line.get("kinds", {})
    right, found = guard["true_positive"] + guard["true_negative"], guard["true_positive"] + guard["false_positive"]
    harmful = guard["true_positive"] + guard["false_negative"]
    percent = lambda part, whole: f"{100 * part / whole:.1f}" if whole else "–"
    return lines_of([
        ["filter on the clients' data", "accuracy", "precision", "recall"],
        ["ours", percent(right, sum(guard.values())), percent(guard["true_positive"], found), percent(guard["true_positive"], harmful)],
        *([f"of {kind}, {of} rows", "", "", percent(found, of)] for kind, (found, of) in sorted(kinds.items())),
        ["the paper's, fine-tuned", "75.5", "56.7", "73.7"],
    ])


def families(arms):
    found = {}
    for arm in arms.values():
        if arm["arm"]["family"] != "main":
            found.setdefault(arm["arm"]["family"], []).append(arm)
    return found


def ablations(arms):
    names = sets(arms)
    rows = [["varied", "value", "seeds", *(f"{name}, safe % by rules / classifier" for name in names), "over-refusal %", "held-out loss", "kB uploaded", "kept", "dropped", "revised", "rounds published"]]
    for family, members in families(arms).items():
        for arm in sorted(members, key=lambda arm: arm["arm"]["x"]):
            of = lambda value, arm=arm: mean(over_seeds(arm, value))
            measure = lambda key: of(lambda ended: ended["measures"][key])
            label = arm["arm"]["name"].split(": ", 1)[1]
            both = [" / ".join(f"{safe_rate(arm, name, judge):.1f}" for judge in JUDGES) for name in names]
            rows.append([family, label, len(arm["seeds"]), *both, f"{100 * measure('over_refusal'):.1f}",
                         f"{measure('held_out_loss'):.3f}", f"{of(lambda e: e['uploaded_bytes']) / 1e3:.0f}",
                         *(f"{of(lambda e: e['samples'].get(kind, 0)):.0f}" for kind in ("kept", "dropped", "revised")), f"{of(lambda e: e['published']):.0f}"])
    return lines_of(rows) if len(rows) > 1 else []


def levels(labels):
    """(place, text) → (place, text, middle of the text, line): a text that would touch its neighbour goes a line lower."""
    ends, placed = [], []
    for place, text in sorted(labels):
        half = CHARACTER * len(text) / 2
        middle = min(max(place, half), WIDTH - half)
        line = next((line for line, end in enumerate(ends) if end + CHARACTER <= middle - half), len(ends))
        ends[line:line + 1] = [middle + half]
        placed.append((place, text, middle, line))
    return placed, len(ends)


def legend(names, y):
    """The names of the lines in their colours, as many in a row as fit; and how many rows that are."""
    out, x, row = [], LEFT, 0
    for name, colour in zip(names, COLOURS):
        wide = CHARACTER * len(name) + 26
        if x > LEFT and x + wide > WIDTH:
            x, row = LEFT, row + 1
        middle = y + LINE * row
        out.append(f'<circle cx="{x + 4:.1f}" cy="{middle - 4}" r="4" fill="{colour}"/><text x="{x + 12:.1f}" y="{middle}">{html.escape(name)}</text>')
        x += wide
    return out, row + 1


def panel(title, series, labels):
    """Lines over a shared axis: name → [(x, y)], y a share from 0 to 100; what the axis says at an x. Gives its height too."""
    xs = sorted({x for points in series.values() for x, _ in points})
    low, high = xs[0], max(xs[-1], xs[0] + 1e-9)
    across = lambda x: LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    down = lambda y: TOP + PLOT - y / 100 * PLOT
    out = [f'<text x="{LEFT}" y="16" font-weight="600">{html.escape(title)}</text>']
    for tick in (0, 25, 50, 75, 100):
        y = down(tick)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#d1d5db"/><text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    placed, count = levels([(across(x), labels.get(x, f"{x:g}")) for x in xs])
    under = [down(0) + 18 + LINE * line for *_, line in placed]
    out += [f'<path d="M{place:.1f},{down(0):.1f} v4 L{middle:.1f},{y - 10:.1f}" fill="none" stroke="#d1d5db"/>' for (place, _, middle, _), y in zip(placed, under)]
    for (_, text, middle, _), y in zip(placed, under):
        half = CHARACTER * len(text) / 2
        # No line from the axis to a lower text goes through this one.
        out.append(f'<rect x="{middle - half:.1f}" y="{y - 10:.1f}" width="{2 * half:.1f}" height="{LINE - 1}" fill="#ffffff"/>')
        out.append(f'<text x="{middle:.1f}" y="{y:.1f}" text-anchor="middle">{html.escape(text)}</text>')
    for (name, points), colour in zip(series.items(), COLOURS):
        points = [(x, across(x), y, down(y)) for x, y in sorted(points)]
        path = " ".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (_, x, _, y) in enumerate(points))
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{html.escape(name)}, {value:g}: {share:.1f}</title></circle>' for value, x, share, y in points]
    bottom = down(0) + 18 + LINE * count + 6
    names, rows = legend(series, bottom)
    return "".join(out + names), bottom + LINE * rows + 10


def plots(arms):
    """Safe shares and over-refusal by the rules, each family a panel; the arms of the table as bars come first."""
    first = sets(arms)[0]
    rows = [(name, arm) for name, arm in arms.items() if arm["arm"]["family"] == "main"]
    bar, body = 22, []
    wide = COLUMNS * WIDTH
    left = 20 + CHARACTER * max((len(name) for name, _ in rows), default=0)
    scale = (wide - left - 80) / 100
    for i, (name, arm) in enumerate(rows):
        y = TOP + i * bar
        value = 100 * mean(over_seeds(arm, safe(first, "rules")))
        half = interval([100 * v for v in over_seeds(arm, safe(first, "rules"))]) or 0
        body.append(f'<text x="{left - 8:.1f}" y="{y + 15}" text-anchor="end">{html.escape(name)}</text><rect x="{left:.1f}" y="{y + 3}" width="{value * scale:.1f}" height="{bar - 7}" fill="{COLOURS[0]}"/>')
        body.append(f'<line x1="{left + max(0, value - half) * scale:.1f}" x2="{left + min(100, value + half) * scale:.1f}" y1="{y + 11}" y2="{y + 11}" stroke="#111827"/>')
        paper = PAPER.get(name)
        if paper:
            body.append(f'<line x1="{left + paper[0] * scale:.1f}" x2="{left + paper[0] * scale:.1f}" y1="{y + 1}" y2="{y + bar - 3}" stroke="{COLOURS[1]}" stroke-width="3"/>')
        body.append(f'<text x="{wide - 60}" y="{y + 15}">{value:.1f}</text>')
    title = f'<text x="{left:.1f}" y="16" font-weight="600">safe answers on {html.escape(first)} in %, by rules; the red mark is the paper\'s figure</text>'
    # Without an arm of the table there are the panels alone.
    title, height = (title, TOP + len(rows) * bar + 20) if rows else ("", 0)
    grouped = {}
    for family, members in families(arms).items():
        # "harm share, plain" and "harm share, ours" are one panel.
        head, _, kind = family.partition(", ")
        points = lambda value: [(arm["arm"]["x"], 100 * mean(over_seeds(arm, value))) for arm in members]
        series, labels = grouped.setdefault(head, ({}, {}))
        for one in sets(arms):
            series[f"{kind}: {one}" if kind else one] = points(safe(one, "rules"))
        if not kind:
            series["benign, refused"] = points(lambda ended: ended["measures"]["over_refusal"])
        words = {arm["arm"]["x"]: arm["arm"]["name"].split(": ", 1)[1] for arm in members}
        labels.update({x: word for x, word in words.items() if not word[0].isdigit()})
    panels = [panel(name, *drawn) for name, drawn in grouped.items()]
    for start in range(0, len(panels), COLUMNS):
        beside = panels[start:start + COLUMNS]
        body += [f'<g transform="translate({column * WIDTH} {height})">{drawn}</g>' for column, (drawn, _) in enumerate(beside)]
        height += math.ceil(max(of for _, of in beside))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {height}" font-family="system-ui, sans-serif" font-size="12" fill="#4b5563">'
            f'<rect width="{wide}" height="{height}" fill="#ffffff"/>{title}{"".join(body)}</svg>\n')


def dose(out):
    plan = json.loads((out / "plan.json").read_text())
    if plan.get("harness") != HARNESS:
        raise SystemExit(f"reproduce-paper: {out}: expected results of harness {HARNESS}, got those of {plan.get('harness', 'an earlier one')}")
    sizes = ", ".join(f"{name} {count}" for name, count in plan["evaluation"])
    return (f"{plan['clients']} clients of {plan['rows']} samples, {plan['chosen']} a round, {plan['rounds']} rounds of {plan['steps']} steps of {plan['batch']} rows "
            f"(at most {plan['row_tokens']} tokens, learning rate {plan['learning_rate']:.3g}); alignment with {plan['redteam']} prompts a round, gates on {plan['gate_rows']} rows a set; "
            f"hostile updates are lengthened {plan['boost']:g} times and claim 100,000 samples. Rows measured: {sizes}. Answers have at most {plan['answer_tokens']} tokens, greedy.")


def said(out):
    """What the answers that were kept say: in how many words the model refuses, and where the judges differ."""
    rows = [row for path in sorted((out / "federations").glob("*.answers.jsonl")) for row in lines(path)]
    if not rows:
        return []
    refused = [row["answer"] for row in rows if row["rules"]]
    differ = collections.Counter((row["answer"], row["rules"]) for row in rows if row["rules"] != row["classifier"])
    told = "; ".join(f"“{answer}” {count}{' (the rules alone call it a refusal)' if rules else ''}" for (answer, rules), count in differ.most_common(SHOWN))
    return [f"- of {len(rows):,} answers that were kept {len(refused):,} refuse by the rules, in {len(set(refused))} distinct texts; the judges differ on {differ.total()}, "
            f"in {len(differ)} texts, by the classifier's word a refusal but where said: {told}"]


def report(out, kind):
    arms, guard = read(out)
    if not arms:
        return "no federation has ended yet"
    agree = [ended["measures"]["judges_agree"] for arm in arms.values() for ended in arm["seeds"].values()]
    parts = [dose(out), ""]
    if (out / "data" / "data.json").is_file():
        data = json.loads((out / "data" / "data.json").read_text())
        told = lambda end: [f"{name} {count}" for name, count in data["counts"].items() if name.endswith(end) and count]
        harmful = ", ".join(f"{kind} {count}" for kind, count in sorted(data["harmful"].items()))
        parts += [f"Left out while the data were prepared: {'; '.join(told('left out')) or 'nothing'}. No evaluation prompt is near a training text (MinHash, checked at every start). "
                  f"Harmful rows that clients draw from: {harmful}; {'; '.join(told('kept')) or 'none is near what the guard learned from'}.", ""]
    if guard:
        parts += [*filtering(guard), ""]
    for lines in (table(arms), costs(arms), order(arms), goals(arms)):
        parts += [*lines, ""] if lines else []
    parts += [f"- the two judges agree on {100 * mean(agree):.1f} % of all answers (least in an arm: {100 * min(agree):.1f} %)"]
    if (out / "carriers.json").is_file():
        digests = json.loads((out / "carriers.json").read_text())
        same = digests["memory"] == digests["quic"]
        parts.append(f"- {'as it should be' if same else '**wrong**'}: the same federation over QUIC ends with the same adapter, byte for byte ({digests['memory'][:16]}… and {digests['quic'][:16]}…)")
    if (out / "took.json").is_file():
        took = json.loads((out / "took.json").read_text())
        part = "" if took["federations"] == took["of"] else f" for {took['federations']} of {took['of']} federations, the last of several runs"
        parts.append(f"- it took {took['minutes']:.0f} minutes on {took['processors']} processors{part}; set-up not counted; commit {took['commit']}")
    parts += said(out)
    varied = ablations(arms)
    if varied:
        parts += ["", *varied]
    return "\n".join(parts) + "\n"


def begin(kind):
    """The line of docs/results.md after which a run's part is."""
    return f"<!-- scripts/reproduce-paper writes from here: {kind} -->\n"


def has_part(kind):
    return begin(kind) in PAGE.read_text(encoding="utf8")


def write(out, kind, docs=False):
    """Writes OUT/results.md and OUT/results.svg, and with `docs` the page's part of this kind; gives the text."""
    text = report(out, kind)
    (out / "results.md").write_text(text, encoding="utf8")
    arms, _ = read(out)
    if not arms:
        return text
    drawing = plots(arms)
    (out / "results.svg").write_text(drawing, encoding="utf8")
    if docs:
        (ROOT / "docs" / f"results-{kind}.svg").write_text(drawing, encoding="utf8")
        ends = [{"arm": name, "seed": seed, **ended} for name, arm in arms.items() for seed, ended in arm["seeds"].items()]
        (ROOT / "docs" / f"results-{kind}.jsonl").write_text("".join(json.dumps(end) + "\n" for end in ends), encoding="utf8")
        end, page = "<!-- to here -->", PAGE.read_text(encoding="utf8")
        before, rest = page.split(begin(kind))
        links = f"\nEach federation by itself: [results-{kind}.jsonl](results-{kind}.jsonl).\n\n![safe answers by arm, and one setting varied at a time](results-{kind}.svg)\n"
        page = before + begin(kind) + text + links + rest[rest.index(end):]
        PAGE.write_text(page, encoding="utf8")
    return text
