"""Golden numbers for the server's optimizers: Flower's own strategies over four rounds of three devices.

    python3 -m venv venv && venv/bin/pip install flwr==1.42.0
    venv/bin/python optimize.py > optimize.json

`../optimize.rs` compares the crate with them. Two of Flower's choices differ from algorithm 2 of Reddi et al. 2021,
which the crate follows, and are undone here: the second moment begins at zero, in place of τ², and FedAdam's step is
corrected for the first rounds' bias, which vanishes at a late round's number.
"""
import json
import logging

import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAdam, FedAvgM, FedYogi

logging.disable(logging.CRITICAL)
rng = np.random.default_rng(20240611)
ROUNDS, DEVICES, VALUES = 4, 3, 14  # one layer, rank 2, q 3 -> 4
RATE, BETAS, TAU, LATE = 0.03, (0.9, 0.99), 1e-3, 100_000

start = rng.normal(0, 0.1, VALUES)
deltas = rng.normal(0, 0.02, (ROUNDS, DEVICES, VALUES))
samples = rng.integers(1, 50, (ROUNDS, DEVICES))
deltas[2] = 0  # nobody moved: the moments still do


def rounds(strategy, current, first):
    """The adapter after each round; every device's weights are the round's start and its delta."""
    releases = []
    for number in range(ROUNDS):
        results = []
        for delta, count in zip(deltas[number], samples[number]):
            parameters = ndarrays_to_parameters([current + delta])
            results.append((None, FitRes(Status(Code.OK, ""), parameters, int(count), {})))
        merged, _ = strategy.aggregate_fit(first + number, results, [])
        current = parameters_to_ndarrays(merged)[0]
        releases.append(current.tolist())
    return releases


def adaptive(kind, first):
    initial = ndarrays_to_parameters([start])
    strategy = kind(initial_parameters=initial, eta=RATE, beta_1=BETAS[0], beta_2=BETAS[1], tau=TAU)
    strategy.v_t = [np.full(VALUES, TAU**2)]
    return rounds(strategy, start, first)


momentum = FedAvgM(
    initial_parameters=ndarrays_to_parameters([start]), server_learning_rate=RATE, server_momentum=BETAS[0]
)
mean = [np.average(deltas[i], axis=0, weights=samples[i]) for i in range(ROUNDS)]
print(
    json.dumps(
        {
            "start": start.tolist(),
            "means": [value.tolist() for value in mean],
            "fedavgm": rounds(momentum, start, 1),
            "fedadam": adaptive(FedAdam, LATE),
            "fedyogi": adaptive(FedYogi, 1),
        },
        indent=1,
    )
)
