"""Golden numbers for merging updates that lie behind (FedBuff, Nguyen et al. 2022, arXiv 2106.06639), in NumPy.

    python3 staleness.py > staleness.json

The server's step of algorithm 1 with the discount of its section on staleness: the mean of s(tau) * delta, with
s(tau) = (1 + tau) ** -exponent, weighted by samples. Clipping is to the median of the discounted norms. A delta is
signs times one magnitude, 127 times a scale of eight bits, which the packed form holds exactly. `../staleness.rs` compares the aggregator with them.
"""
import json

import numpy as np

rng = np.random.default_rng(20241129)
DEVICES, VALUES = 7, 128

signs = rng.choice([-1, 1], (DEVICES, VALUES))
magnitudes = 127 * rng.integers(128, 256, DEVICES) * 2.0**-17
samples = rng.integers(5, 60, DEVICES)
behind = np.array([0, 3, 1, 0, 15, 2, 0])
deltas = signs * magnitudes[:, None]


def case(rule, exponent, clip):
    moved = deltas * ((1.0 + behind) ** -exponent)[:, None]
    if clip:
        norms = np.linalg.norm(moved, axis=1)
        moved = moved * np.minimum(1.0, clip * np.median(norms) / norms)[:, None]
    merged = np.average(moved, axis=0, weights=samples) if rule == "mean" else np.median(moved, axis=0)
    return {"rule": rule, "exponent": exponent, "clip": clip, "merged": np.round(merged, 9).tolist()}


cases = [case("mean", e, c) for e in (0.0, 0.5, 1.0, 1.3) for c in (0.0, 1.0)]
cases += [case("median", 0.5, 0.0)]
facts = {
    "signs": signs.tolist(),
    "magnitudes": magnitudes.tolist(),
    "samples": samples.tolist(),
    "behind": behind.tolist(),
    "cases": cases,
}
print("{" + ",\n".join(f'"{name}": {json.dumps(fact)}' for name, fact in facts.items()) + "}")
