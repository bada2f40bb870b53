"""Golden numbers for merging and quantization, computed with NumPy alone from their definitions.

    python3 make.py > golden.json

`../golden.rs` compares the crate with them.
"""
import json

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


wide = rows.astype(np.float64)
krum, excluded = multi_krum(wide, 2)
flat = rows[:, :].reshape(-1)[:VALUES]
largest = np.sort(np.argsort(-np.abs(flat), kind="stable")[:7])
sparse = np.zeros_like(flat)
sparse[largest] = quantized(flat[largest], 7, 8)
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
            "quantized_2": quantized(flat, 1, 8).tolist(),
            "quantized_4_top_half": sparse.tolist(),
        },
        indent=1,
    )
)
