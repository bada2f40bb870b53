"""Draws reliability.svg: how often rows of each probability were unsafe, from the lines that `train-reference --json` printed.

    python plot_reliability.py adapters/calibration.jsonl adapters/evaluation.jsonl adapters/reliability.svg

A curve for each `evaluate` event, but for rows near ones that were trained on (`-near`). A `calibrated` event has none: its
rows are those that the calibration was fitted on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from make_demo_data import read_jsonl

SIDE, EDGE = 300, 40
COLOURS = ["#1b6ca8", "#c8553d", "#4c8c4a", "#7a5195"]


def curves(paths: list[str]) -> list[tuple[str, float, list[dict]]]:
    """(name, expected calibration error, bins)"""
    found = []
    for event in (event for path in paths for event in read_jsonl(Path(path))):
        name = event.get("file", "").removesuffix(".jsonl")
        if event["event"] == "evaluate" and not name.endswith("-near"):
            found.append((name, event["calibration_error"], event["reliability"]))
    return found


def main() -> None:
    *sources, out = sys.argv[1:]
    at = lambda x, y: f"{EDGE + SIDE * x:.1f},{EDGE + SIDE * (1 - y):.1f}"
    size = SIDE + 2 * EDGE
    drawn = curves(sources)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size + 230} {size}" font-family="sans-serif" font-size="12">']
    svg.append(f'<rect width="100%" height="100%" fill="white"/><rect x="{EDGE}" y="{EDGE}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#888"/>')
    svg.append(f'<polyline points="{at(0, 0)} {at(1, 1)}" stroke="#bbb" stroke-dasharray="4"/>')
    for i, (name, error, bins) in enumerate(drawn):
        colour, filled = COLOURS[i % len(COLOURS)], [b for b in bins if b["count"]]
        points = [at(b["confidence"], b["frequency"]) for b in filled]
        svg.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point, b in zip(points, filled):
            x, y = point.split(",")
            svg.append(f'<circle cx="{x}" cy="{y}" r="{2 + min(b["count"], 800) ** 0.5 / 7:.1f}" fill="{colour}" fill-opacity="0.6"/>')
        svg.append(f'<text x="{size}" y="{EDGE + 14 + 20 * i}" fill="{colour}">{name}: {error:.3f}</text>')
    svg.append(f'<text x="{EDGE + SIDE / 2}" y="{size - 8}" text-anchor="middle">probability of unsafe</text>')
    svg.append(f'<text x="14" y="{EDGE + SIDE / 2}" text-anchor="middle" transform="rotate(-90 14 {EDGE + SIDE / 2})">share that was unsafe</text>')
    for tick in (0, 0.5, 1):
        svg.append(f'<text x="{EDGE + SIDE * tick}" y="{EDGE + SIDE + 16}" text-anchor="middle">{tick:g}</text>')
        svg.append(f'<text x="{EDGE - 6}" y="{EDGE + SIDE * (1 - tick) + 4}" text-anchor="end">{tick:g}</text>')
    Path(out).write_text("\n".join(svg) + "\n</svg>\n")


if __name__ == "__main__":
    main()
