"""Golden numbers for the exact merge: NumPy's SVD of the dense sum of products.

    python3 exact.py > exact.json

`../exact.rs` compares the crate with them: the products of the new factors, for the factors themselves are anybody's.
"""
import json

import numpy as np

rng = np.random.default_rng(20240613)
LAYERS, RANK, DEVICES = 2, 2, 4
MODULES = {"q": (3, 4), "down": (9, 5)}  # inputs, outputs: of q, fewer than devices times rank

start, deltas = [], [[] for _ in range(DEVICES)]
weights = rng.integers(1, 50, DEVICES)
products, left_out, whole = [], 0.0, 0.0
for _ in range(LAYERS):
    for inputs, outputs in MODULES.values():
        a = rng.normal(0, 0.5, (RANK, inputs)).astype(np.float32)
        b = rng.normal(0, 0.2, (outputs, RANK)).astype(np.float32)
        start += [*a.ravel(), *b.ravel()]
        total = np.zeros((outputs, inputs))
        for device, weight in enumerate(weights):
            da = rng.normal(0, 0.1, a.shape).astype(np.float32)
            db = rng.normal(0, 0.1, b.shape).astype(np.float32)
            deltas[device] += [*da.ravel(), *db.ravel()]
            total += weight * ((b.astype(np.float64) + db) @ (a.astype(np.float64) + da))
        u, s, v = np.linalg.svd(total / weights.sum(), full_matrices=False)
        products.append(((u[:, :RANK] * s[:RANK]) @ v[:RANK]).tolist())
        left_out += (s[RANK:] ** 2).sum()
        whole += (s**2).sum()
print(
    json.dumps(
        {
            "start": [float(value) for value in start],
            "deltas": [[float(value) for value in delta] for delta in deltas],
            "weights": weights.tolist(),
            "products": products,
            "residual": float(np.sqrt(left_out / whole)),
        },
        indent=1,
    )
)
