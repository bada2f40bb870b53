"""Golden numbers for FedProx (Li et al. 2020, arXiv 1812.06127): its local objective, stepped along by AdamW, in NumPy.

    python3 fedprox.py > fedprox.json

The device's loss is F(y) = c·y, so that its gradient is c wherever y is; the objective is the quadratic
h(y) = c·y + mu/2·|y − x|², and its gradient is taken here by central differences, exact for a quadratic. AdamW is
algorithm 2 of Loshchilov and Hutter (2019), without weight decay. `../fedprox.rs` compares the trainer with them.
"""
import json

import numpy as np

rng = np.random.default_rng(20241203)
VALUES, STEPS, RATE = 16, 10, 0.005
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8

x = rng.normal(0, 0.02, VALUES).astype(np.float32).astype(np.float64)
c = (rng.uniform(0.2, 1.0, VALUES) * rng.choice([-1, 1], VALUES)).astype(np.float32).astype(np.float64)


def gradient(mu, y):
    """Of h, one coordinate after the other: each has a term of its own."""

    def terms(y):
        return c * y + mu / 2 * (y - x) ** 2

    return (terms(y + 0.5) - terms(y - 0.5)) / 1.0


def adamw(mu):
    y, m, v, path = x.copy(), np.zeros(VALUES), np.zeros(VALUES), []
    for t in range(1, STEPS + 1):
        g = gradient(mu, y)
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g * g
        y = y - RATE * (m / (1 - BETA1**t)) / (np.sqrt(v / (1 - BETA2**t)) + EPS)
        path.append(np.round(y, 9).tolist())
    return {"mu": mu, "path": path}


facts = {"x": x.tolist(), "c": c.tolist(), "learning_rate": RATE, "cases": [adamw(mu) for mu in (0.0, 10.0, 60.0)]}
print("{" + ",\n".join(f'"{name}": {json.dumps(fact)}' for name, fact in facts.items()) + "}")
