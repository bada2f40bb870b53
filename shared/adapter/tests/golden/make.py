"""Golden numbers for merging and quantization, computed with NumPy alone from their definitions; and the bytes of a
packed delta of 3-bit levels, put together from docs/wire.md.

    python3 make.py > golden.json     (writes three_bits.packed beside it)

`../golden.rs` compares the crate with them.
"""
import json
import pathlib

import numpy as np

rng = np.random.default_rng(20240607)
DEVICES, VALUES = 9, 14  # one layer, rank 2, q 3 -> 4: A is 2x3, B is 4x2

rows = rng.normal(0, 0.02, (DEVICES, VALUES)).astype(np.float32)
rows[4] *= 12  # an attacker
rows[7] = rows[6] * np.float32(-1.5)
weights = rng.integers(1, 500, DEVICES)
norms = np.linalg.norm(rows.astype(np.float64), axis=1)


def clipped(bound):
    factors = np.minimum(1.0, bound / norms)
    return (rows.astype(np.float64) * factors[:, None]).astype(np.float32).astype(np.float64)


def mean(values):
    return np.average(values, axis=0, weights=weights)


def trimmed(values, share):
    cut = int(share * len(values))
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def multi_krum(values, byzantine):
    n = len(values)
    distances = ((values[:, None] - values[None]) ** 2).sum(-1)
    scores = []
    for i in range(n):
        others = np.sort(np.delete(distances[i], i))
        scores.append(others[: n - byzantine - 2].sum())
    kept = sorted(np.argsort(scores, kind="stable")[: n - byzantine].tolist())
    return values[kept].mean(axis=0), [i for i in range(n) if i not in kept]


def scale_up_bf16(scale):
    bits = np.float32(scale).view(np.uint32)
    return np.uint32(((int(bits) + 0xFFFF) >> 16) << 16).view(np.float32)


def quantized(values, level_max, block):
    """Blocks of values to the nearest of 2·level_max + 1 levels, and back."""
    result = []
    for start in range(0, len(values), block):
        chunk = values[start : start + block]
        scale = scale_up_bf16(np.abs(chunk).max() / np.float32(level_max))
        result.append(np.rint(chunk / scale).astype(np.float32) * scale)
    return np.concatenate(result)


def levels_by_spread(values, block):
    """3-bit levels and the scales of their blocks: steps of 0.72 root mean squares, to the nearest."""
    levels, scales = [], []
    for start in range(0, len(values), block):
        chunk = values[start : start + block]
        squares = sum(float(value) ** 2 for value in chunk)
        scale = scale_up_bf16(0.72 * (squares / len(chunk)) ** 0.5)
        scales.append(scale)
        levels += [int(level) for level in np.rint(chunk / scale)]
    return levels, scales


def shares_of(levels):
    """Of the levels from the lowest (−1 at most) to the highest (1 at least), in units of 2⁻¹⁴."""
    lowest, highest = min(levels + [-1]), max(levels + [1])
    counts = [levels.count(level) for level in range(lowest, highest + 1)]
    shares = [max(1, count * 2**14 // len(levels)) for count in counts]
    shares[counts.index(max(counts))] += 2**14 - sum(shares)
    return lowest, shares


def coded(levels, lowest, shares):
    """The words of the numeral system."""
    words, state = [], 0
    for level in reversed(levels):
        share, left = shares[level - lowest], sum(shares[: level - lowest])
        if state >= share << 50:
            words.append(state % 2**32)
            state >>= 32
        state = (state // share << 14) + left + state % share
    while state:
        words.append(state % 2**32)
        state >>= 32
    return words


def read(words, lowest, shares, count):
    """What a decoder makes of them, as docs/wire.md says."""
    words, state, levels = list(words), 0, []
    while words and state < 2**32:
        state = state * 2**32 + words.pop()
    for _ in range(count):
        rest, level, left = state % 2**14, 0, 0
        while rest >= left + shares[level]:
            left, level = left + shares[level], level + 1
        state = state // 2**14 * shares[level] + rest - left
        if state < 2**32 and words:
            state = state * 2**32 + words.pop()
        levels.append(lowest + level)
    assert state == 0 and not words
    return levels


def number(value):
    """LEB128, as postcard writes lengths and integers."""
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value // 128)


def three_bits(levels, scales, block):
    """A packed delta of version 2 of the layout below; zstd keeps so short a text as one raw block."""
    layout = bytes.fromhex("b8c8193238e834cb62085fcd148dde05")  # of BLAKE3, as in four_bits.packed
    high = [int(scale.view(np.uint32)) >> 24 for scale in scales]
    low = [int(scale.view(np.uint32)) >> 16 & 255 for scale in scales]
    planes = bytes(high + low)
    zstd = bytes.fromhex("28b52ffd20") + bytes([len(planes)]) + (len(planes) * 8 + 1).to_bytes(3, "little") + planes
    lowest, shares = shares_of(levels)
    words = coded(levels, lowest, shares)
    assert read(words, lowest, shares, len(levels)) == levels
    shares = b"".join(share.to_bytes(2, "little") for share in shares)
    words = b"".join(word.to_bytes(4, "little") for word in words)
    head = bytes([2]) + layout + bytes([0, 3]) + number(block) + bytes([0]) + number(len(levels)) + bytes([0])
    parts = number(len(zstd)) + zstd + bytes([2, lowest % 256])
    return head + parts + number(len(shares)) + shares + number(len(words)) + words


wide = rows.astype(np.float64)
krum, excluded = multi_krum(wide, 2)
flat = rows[:, :].reshape(-1)[:VALUES]
largest = np.sort(np.argsort(-np.abs(flat), kind="stable")[:7])
sparse = np.zeros_like(flat)
sparse[largest] = quantized(flat[largest], 7, 8)
levels, scales = levels_by_spread(flat, 8)
pathlib.Path(__file__).with_name("three_bits.packed").write_bytes(three_bits(levels, scales, 8))
print(
    json.dumps(
        {
            "rows": rows.tolist(),
            "weights": weights.tolist(),
            "norms": norms.tolist(),
            "mean": mean(wide).tolist(),
            "mean_clipped_at_0.075": mean(clipped(0.075)).tolist(),
            "clipped_at_0.075": np.flatnonzero(norms > 0.075).tolist(),
            "mean_clipped_at_median": mean(clipped(np.median(norms))).tolist(),
            "median": np.median(wide, axis=0).tolist(),
            "median_of_8": np.median(wide[:8], axis=0).tolist(),
            "trimmed_mean_0.25": trimmed(wide, 0.25).tolist(),
            "multi_krum_2": krum.tolist(),
            "multi_krum_2_excluded": excluded,
            "quantized_8": quantized(flat, 127, 8).tolist(),
            "quantized_4": quantized(flat, 7, 8).tolist(),
            "quantized_3": [float(np.float32(level) * scales[i // 8]) for i, level in enumerate(levels)],
            "quantized_2": quantized(flat, 1, 8).tolist(),
            "quantized_4_top_half": sparse.tolist(),
        },
        indent=1,
    )
)
