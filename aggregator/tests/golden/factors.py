"""Golden numbers for rounds that train one factor of LoRA: FFA-LoRA (Sun et al. 2024, arXiv 2403.12313), whose A stays as
it began, and RoLoRA (Chen et al. 2024, arXiv 2409.02346), which trains B in odd rounds and A in even ones; in NumPy.

    python3 factors.py > factors.json

A release's factor is the mean of the devices' factors, weighted by samples. `products` are the means of the devices'
dense products B·A, which such a release's own products must be: that is what the modes are for. A delta is whole
numbers times a scale of eight bits, which the packed form of eight bits holds exactly. `../factors.rs` compares the
aggregator with them.
"""
import json

import numpy as np

rng = np.random.default_rng(20241204)
LAYERS, RANK, DEVICES, ROUNDS = 2, 2, 3, 4
MODULES = {"q": (5, 6), "down": (7, 4)}  # inputs, outputs

shapes = [shape for _ in range(LAYERS) for i, o in MODULES.values() for shape in ((RANK, i), (o, RANK))]
samples = rng.integers(5, 60, DEVICES)


def flat(matrices):
    return np.concatenate([matrix.ravel() for matrix in matrices])


def beginning():
    """A random, B zero, as LoRA begins."""
    return [
        rng.normal(0, 0.5, shape).astype(np.float32).astype(np.float64) if number % 2 == 0 else np.zeros(shape)
        for number, shape in enumerate(shapes)
    ]


def products(matrices):
    return [b @ a for a, b in zip(matrices[::2], matrices[1::2])]


def mean(of_devices):
    return [np.average(parts, axis=0, weights=samples) for parts in zip(*of_devices)]


def run(factor_of):
    release, rounds = beginning(), []
    start = flat(release)
    for number in range(1, ROUNDS + 1):
        moved = factor_of(number)
        devices, levels, scales = [], [], []
        for _ in range(DEVICES):
            scale = rng.integers(128, 256) * 2.0**-17
            whole = [rng.integers(-127, 128, shape) for shape in shapes]
            sent = [part for place, part in enumerate(whole) if "AB"[place % 2] == moved]
            sent[0].flat[0] = 127  # the largest there is, so that the scale is this one
            own = [
                matrix + part * scale if "AB"[place % 2] == moved else matrix
                for place, (matrix, part) in enumerate(zip(release, whole))
            ]
            devices.append(own)
            levels.append(flat(sent).tolist())
            scales.append(scale)
        release = mean(devices)
        averaged = mean([products(device) for device in devices])
        rounds.append(
            {
                "factor": moved,
                "levels": levels,
                "scales": scales,
                "release": np.round(flat(release), 9).tolist(),
                "products": np.round(flat(averaged), 9).tolist(),
            }
        )
    return {"start": start.tolist(), "rounds": rounds}


modes = {"ffa": run(lambda number: "B"), "rolora": run(lambda number: "B" if number % 2 == 1 else "A")}
facts = {"samples": samples.tolist(), **modes}
print("{" + ",\n".join(f'"{name}": {json.dumps(fact)}' for name, fact in facts.items()) + "}")
