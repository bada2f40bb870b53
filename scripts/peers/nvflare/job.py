"""Federated averaging of noise in NVIDIA FLARE's simulator: job.py MEGABYTES DEVICES ROUNDS WORKSPACE.

The simulator runs the server and each device as a process of its own, with its sockets between them, on one machine.
"""

import pathlib
import sys

import numpy as np
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

megabytes, devices, rounds = (int(argument) for argument in sys.argv[1:4])
workspace = pathlib.Path(sys.argv[4]).resolve()
workspace.mkdir(parents=True, exist_ok=True)
start = workspace / "start.npy"
np.save(start, np.random.default_rng(0).standard_normal(megabytes * 250_000, dtype=np.float32))
recipe = NumpyFedAvgRecipe(
    name="rounds",
    initial_ckpt=str(start),
    min_clients=devices,
    num_rounds=rounds,
    train_script=str(pathlib.Path(__file__).resolve().parent / "client.py"),
)
recipe.execute(SimEnv(num_clients=devices, num_threads=devices, workspace_root=str(workspace)))
