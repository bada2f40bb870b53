"""Draws how many times as fast as each peer we are, and how fast we mean to be, as an SVG for light and dark pages.

A bar begins at the peer's speed and ends at ours, on a logarithmic scale, so that twice and half as fast are as long.
Called by ../bench_peers.py; the same figures give the same bytes.
"""

import html
import math

WIDTH, LABELS, RIGHT, TOP, ROW, BOTTOM = 900, 390, 130, 64, 34, 34
TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
  .small { font-size: 11px; fill: #656d76 }
  .title { font-size: 15px; font-weight: 600 }
  .grid { stroke: #d8dee4 }
  .even { stroke: #656d76; stroke-width: 1.5 }
  .faster { fill: #2f81b7 } .slower { fill: #d1793b }
  .target { fill: none; stroke: #1f2328; stroke-width: 1.6 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 }
    .grid { stroke: #30363d } .even { stroke: #9198a1 }
    .faster { fill: #4a9fd8 } .slower { fill: #e08b4f }
    .target { stroke: #e6edf3 }
  }
"""


def draw(marks):
    """The SVG of (what, peer, times as fast, target or none) in this order."""
    low, high = span([value for mark in marks for value in mark[2:] if value])
    end = WIDTH - RIGHT
    place = lambda times: LABELS + (end - LABELS) * math.log(times / low) / math.log(high / low)
    height = TOP + ROW * len(marks) + BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">',
        "<title>Times as fast as others, with targets</title>",
        f"<style>{STYLE}</style>",
        '<text class="title" x="12" y="26">Times as fast as others</text>',
        legend(),
    ]
    foot = TOP + ROW * len(marks)
    for tick in TICKS:
        if low <= tick <= high:
            kind = "even" if tick == 1 else "grid"
            out.append(f'<line class="{kind}" x1="{place(tick):.1f}" x2="{place(tick):.1f}" y1="{TOP - 6}" y2="{foot}"/>')
            name = "as fast" if tick == 1 else f"{tick:g} ×"
            out.append(f'<text class="small" x="{place(tick):.1f}" y="{foot + 18}" text-anchor="middle">{name}</text>')
    for row, (what, peer, times, target) in enumerate(marks):
        out += bar(TOP + ROW * row, what, peer, times, target, place)
    return "\n".join([*out, "</svg>", ""])


def bar(top, what, peer, times, target, place):
    """One row."""
    middle = top + ROW / 2
    left, right = sorted((place(1), place(times)))
    kind = "faster" if times >= 1 else "slower"
    rows = [
        f'<text x="12" y="{top + 14}">{html.escape(what)}</text>',
        f'<text class="small" x="12" y="{top + 27}">beside {html.escape(peer)}</text>',
        f'<rect class="{kind}" x="{left:.1f}" y="{middle - 7}" width="{max(right - left, 1):.1f}" height="14" rx="2"/>',
    ]
    if target:
        rows.append(diamond(place(target), middle))
        goal = f'<tspan class="small"> of {figure(target)}</tspan>'
    else:
        goal = ""
    rows.append(f'<text x="{WIDTH - 12}" y="{middle + 4.5}" text-anchor="end">{figure(times)}{goal}</text>')
    return rows


def figure(times):
    return f"{times:.2f} ×" if times < 10 else f"{times:.0f} ×"


def diamond(x, y):
    return f'<path class="target" d="M {x:.1f} {y - 10} l 5 10 l -5 10 l -5 -10 z"/>'


def legend():
    """Bars and mark, named, at the right of the title."""
    items = [("faster", "faster"), ("slower", "slower"), ("target", "to be reached")]
    x, parts = WIDTH - 300, []
    for kind, name in items:
        if kind == "target":
            parts.append(diamond(x + 6, 22))
        else:
            parts.append(f'<rect class="{kind}" x="{x}" y="15" width="14" height="14" rx="2"/>')
        parts.append(f'<text class="small" x="{x + 20}" y="26">{name}</text>')
        x += 84
    return "\n".join(parts)


def span(values):
    """From a tick at or below the least to one at or above the greatest, and 1 between them."""
    least, greatest = min([0.5, *values]), max([5, *values])
    low = max((tick for tick in TICKS if tick <= least), default=TICKS[0])
    return low, min((tick for tick in TICKS if tick >= greatest), default=TICKS[-1])
