"""Draws the demo's report: one self-contained HTML page with inline SVG, from the figures in report.json.

Called by scripts/demo. Nothing here computes a result; it only shows what the aggregator and the devices reported.
"""

import html

COLOURS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f"]
NAMES = {"full": "full pipeline", "plain": "plain averaging"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 260, 56, 16, 16, 40
BAR_LEFT = 170

STYLE = """
:root { color-scheme: light dark; --ink: #111827; --soft: #6b7280; --line: #d1d5db; --card: #ffffff; --page: #f3f4f6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f3f4f6; --soft: #9ca3af; --line: #374151; --card: #111827; --page: #030712; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto;
       max-width: 1160px; padding: 24px; }
h1 { margin: 0 0 4px; } h2 { margin: 32px 0 12px; } p { color: var(--soft); max-width: 78ch; }
.cards, .plots { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 26px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: 6px 10px; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .axis { stroke: var(--line); } figcaption { font-weight: 600; margin-bottom: 6px; } figure { margin: 0; }
.pass { color: #059669; } .fail { color: #dc2626; } code { font-size: 13px; }
"""


def esc(value):
    return html.escape(str(value))


def nice(value):
    if value is None:
        return "–"
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1000:
            return f"{value:.3f}".rstrip("0").rstrip(".")
        return f"{value:.3g}"
    return str(value)


def scale(low, high):
    """Axis ends and five ticks around the values; never a zero-height axis."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    pad = (high - low) * 0.08
    low, high = low - pad, high + pad
    return low, high, [low + (high - low) * i / 4 for i in range(5)]


def frame(caption, body, legend):
    keys = "".join(
        f'<span style="color:{colour}">■</span> {esc(name)} &nbsp; ' for name, colour in legend
    )
    return (
        f'<figure class="card"><figcaption>{esc(caption)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(caption)}">{body}</svg>'
        f"<div>{keys}</div></figure>"
    )


def lines(caption, series, x_label, share=False):
    """A line plot. series: name → [(x, y)]. A share has an axis from 0 to 100 %."""
    series = {name: [(x, y) for x, y in points if y is not None] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return frame(caption, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}">no data</text>', [])
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    bottom, top, ticks = (0.0, 1.0, [i / 4 for i in range(5)]) if share else scale(min(ys), max(ys))
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def at(x, y):
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM),
        )

    out = []
    for tick in ticks:
        _, y = at(left, tick)
        out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{percent(tick) if share else nice(round(tick, 3))}</text>')
    steps = sorted(set(xs))
    for x in steps[:: max(1, len(steps) // 8)]:
        px, _ = at(x, bottom)
        out.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{nice(x)}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{esc(x_label)}</text>')
    legend = []
    for (name, points), colour in zip(series.items(), COLOURS * 4):
        path = " ".join(f"{'M' if i == 0 else 'L'}{at(*p)[0]:.1f},{at(*p)[1]:.1f}" for i, p in enumerate(points))
        out.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) <= 24:
            for x, y in points:
                px, py = at(x, y)
                out.append(
                    f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}">'
                    f"<title>{esc(name)}, {x}: {nice(y)}</title></circle>"
                )
        legend.append((name, colour))
    return frame(caption, "".join(out), legend)


def bars(caption, groups, parts, unit):
    """Stacked horizontal bars. groups: name → {part: value}."""
    top = max((sum(values.get(p, 0) for p in parts) for values in groups.values()), default=0) or 1
    row = (HEIGHT - TOP - 24) / max(1, len(groups))
    out = []
    for i, (name, values) in enumerate(groups.items()):
        y = TOP + i * row
        x = float(BAR_LEFT)
        out.append(f'<text x="{BAR_LEFT - 8}" y="{y + row / 2 + 4:.1f}" text-anchor="end">{esc(name)}</text>')
        for part, colour in zip(parts, COLOURS * 4):
            width = values.get(part, 0) / top * (WIDTH - BAR_LEFT - RIGHT - 70)
            out.append(
                f'<rect x="{x:.1f}" y="{y + row * 0.15:.1f}" width="{width:.1f}" height="{row * 0.7:.1f}" '
                f'fill="{colour}"><title>{esc(name)}, {esc(part)}: {nice(values.get(part, 0))} {unit}</title></rect>'
            )
            x += width
        out.append(f'<text x="{x + 6:.1f}" y="{y + row / 2 + 4:.1f}">{nice(sum(values.get(p, 0) for p in parts))} {unit}</text>')
    return frame(caption, "".join(out), list(zip(parts, COLOURS * 4)))


def table(head, rows):
    cells = "".join(f"<th>{esc(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def percent(value):
    return "–" if value is None else f"{100 * value:.1f} %"


def by_round(arm, key):
    return [(r["round"], r.get(key)) for r in arm["rounds"]]


def page(report):
    """The whole page."""
    arms = {NAMES[name]: arm for name, arm in report["arms"].items()}
    first = next(iter(arms.values()))
    cards = [
        *((f"safe rate, {name}", percent(arm["safe_rate"])) for name, arm in arms.items()),
        ("safe rate of the base", percent(first["rounds"][0].get("safe_rate"))),
        ("held-out loss", nice(report["held_out_loss"])),
        ("bits per parameter", nice(report["bits_per_parameter"])),
        ("published release", report["release"]),
        ("samples dropped", report["dropped"]),
        ("samples revised or refused", report["revised"]),
    ]
    out = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Commonweal demo</title>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style><h1>Commonweal demo</h1>",
        f"<p>{esc(report['what'])} Measured on {esc(report['machine'])}, {esc(report['date'])}; "
        f"{nice(report['seconds'])} s in all.</p><div class=cards>",
    ]
    out += [f'<div class="card"><b>{esc(v)}</b><span>{esc(k)}</span></div>' for k, v in cards]
    out.append("</div><h2>Safety and usefulness, round by round</h2><p>Round 0 is the base. The safe rate is the share of "
               "harmful requests of the evaluation set whose answer is a refusal by the rules or is not called unsafe by the "
               "guard; the plain arm is federated averaging without filter, revision, clipping, alignment or gates, on the "
               "same devices and data.</p><div class=plots>")
    out.append(lines("safe rate", {n: by_round(a, "safe_rate") for n, a in arms.items()}, "round", share=True))
    out.append(lines("held-out loss (benign chat)", {n: by_round(a, "held_out_loss") for n, a in arms.items()}, "round"))
    out.append(lines("over-refusal of benign prompts", {n: by_round(a, "over_refusal") for n, a in arms.items()}, "round", share=True))
    for name, arm in arms.items():
        losses = {d["name"]: list(enumerate(d["losses"])) for d in arm["devices"] if d.get("losses")}
        out.append(lines(f"training loss on the devices, {name}", losses, "optimizer step, all rounds"))
    out.append("</div><h2>What each device did</h2><div class=plots>")
    for name, arm in arms.items():
        parts = ["kept", "revised", "refused", "dropped"]
        out.append(bars(f"samples, {name} (last screening)", {d["name"]: d for d in arm["devices"]}, parts, ""))
    for name, arm in arms.items():
        sent = {d["name"]: {"update": d.get("bytes", 0) / 1e3} for d in arm["devices"]}
        out.append(bars(f"bytes sent over all rounds, {name}", sent, ["update"], "kB"))
    for name, arm in arms.items():
        seconds = {stage: {"seconds": value} for stage, value in arm["stage_seconds"].items()}
        out.append(bars(f"seconds a stage, all rounds, {name}", seconds, ["seconds"], "s"))
    out.append("</div><h2>Rounds</h2>")
    for name, arm in arms.items():
        rows = [
            [r["round"], percent(r.get("safe_rate")), percent(r.get("over_refusal")), nice(r.get("held_out_loss")),
             r.get("updates", "–"), r.get("clipped", "–"), r.get("excluded", "–"), r.get("align_steps", "–"),
             f'<span class="{"pass" if r.get("published") else "fail"}">{esc(r.get("outcome", "–"))}</span>']
            for r in arm["rounds"]
        ]
        head = ["round", "safe rate", "over-refusal", "held-out loss", "updates", "clipped", "excluded", "alignment steps", "outcome"]
        out.append(f"<h3>{esc(name)}</h3>" + table(head, rows))
    for name, arm in arms.items():
        out.append(f"<h2>Devices, {esc(name)}</h2>" + table(
            ["device", "samples", "kept", "revised", "refused", "dropped", "bytes", "bits per parameter", "installed release"],
            [[esc(d["name"]), d.get("samples", "–"), d.get("kept", "–"), d.get("revised", "–"), d.get("refused", "–"),
              d.get("dropped", "–"), d.get("bytes", "–"), nice(d.get("bits_per_parameter")), d.get("installed", "–")]
             for d in arm["devices"]]))
    return "".join(out)
