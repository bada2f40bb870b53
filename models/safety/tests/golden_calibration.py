"""Writes data/golden_calibration.json: Platt scaling by gradient descent with momentum (not Newton), bins, thresholds.

usage: python golden_calibration.py        (needs numpy)
"""
import json
import pathlib

import numpy as np

rng = np.random.default_rng(7)
n = 160
y = rng.random(n) < 0.35
x = np.round(np.where(y, 1.4, -0.9) + rng.normal(0, 1.6, n), 4)

positives, negatives = y.sum(), (~y).sum()
t = np.where(y, (positives + 1) / (positives + 2), 1 / (negatives + 2))
w = np.zeros(2)
v = np.zeros(2)
features = np.stack([x, np.ones(n)], 1)
for _ in range(200_000):
    p = 1 / (1 + np.exp(-features @ w))
    v = 0.9 * v - 0.002 * features.T @ (p - t)
    w = w + v
p = 1 / (1 + np.exp(-features @ w))

edges = np.linspace(0, 1, 11)
which = np.clip(np.digitize(p, edges) - 1, 0, 9)
ece = sum(abs(p[which == b].mean() - y[which == b].mean()) * (which == b).mean() for b in range(10) if (which == b).any())

ordered = np.sort(p)[::-1]


def best(value):
    scores = []
    for i, cut in enumerate(ordered):
        chosen = p >= cut
        scores.append(value((chosen & y).sum() / chosen.sum(), (chosen & y).sum() / positives))
    i = int(np.argmax(scores))
    return float((ordered[i] + (ordered[i + 1] if i + 1 < n else 0.0)) / 2)


golden = {
    "log_odds": x.tolist(),
    "is_unsafe": y.tolist(),
    "slope": float(w[0]),
    "intercept": float(w[1]),
    "ece_10": float(ece),
    "bin_counts": [int((which == b).sum()) for b in range(10)],
    "threshold_f1": best(lambda a, r: 2 * a * r / (a + r) if a + r else 0.0),
    "threshold_recall_90": best(lambda a, r: a if r >= 0.9 else -1.0),
    "threshold_precision_90": best(lambda a, r: r if a >= 0.9 else -1.0),
}
path = pathlib.Path(__file__).parent / "data" / "golden_calibration.json"
path.write_text(json.dumps(golden) + "\n")
