"""Golden numbers for SCAFFOLD: algorithm 1 of Karimireddy et al. 2020 with option II, in NumPy, on quadratics.

    python3 scaffold.py > scaffold.json

Each of four devices has fᵢ(x) = ½·(x − bᵢ)ᵀ·diag(hᵢ)·(x − bᵢ); three of them take part in each of five rounds.
`../scaffold.rs` compares the crate with them.
"""
import json

import numpy as np

rng = np.random.default_rng(20240612)
DEVICES, SAMPLED, ROUNDS, STEPS, VALUES = 4, 3, 5, 6, 14  # one layer, rank 2, q 3 -> 4
LOCAL, GLOBAL = 0.1, 0.8

hessians = rng.uniform(0.2, 3.0, (DEVICES, VALUES))
optima = rng.normal(0, 1, (DEVICES, VALUES))
x, c = rng.normal(0, 1, VALUES), np.zeros(VALUES)
own = np.zeros((DEVICES, VALUES))
start, rounds = x.copy(), []
for _ in range(ROUNDS):
    chosen = np.sort(rng.permutation(DEVICES)[:SAMPLED])
    moves, changes = [], []
    for i in chosen:
        y = x.copy()
        for _ in range(STEPS):
            y = y - LOCAL * (hessians[i] * (y - optima[i]) - own[i] + c)
        after = own[i] - c + (x - y) / (STEPS * LOCAL)
        moves.append(y - x)
        changes.append(after - own[i])
        own[i] = after
    x = x + GLOBAL * np.mean(moves, axis=0)
    c = c + SAMPLED / DEVICES * np.mean(changes, axis=0)
    rounds.append({"chosen": chosen.tolist(), "x": x.tolist(), "c": c.tolist(), "own": own.tolist()})
print(
    json.dumps(
        {"hessians": hessians.tolist(), "optima": optima.tolist(), "start": start.tolist(), "rounds": rounds},
        indent=1,
    )
)
