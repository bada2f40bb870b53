"""Federated averaging of noise; writes when each round began and ended, by the server's clock, as JSON to `out`."""

import json
import resource
import time

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

# The tensors of our adapter: 25 layers, two linears, two factors each.
TENSORS = 100

app = ServerApp()


class Timed(FedAvg):
    """Notes the time around each round."""

    def __init__(self, **options):
        super().__init__(**options)
        self.begun, self.seconds = 0.0, []

    def configure_train(self, server_round, arrays, config, grid):
        self.begun = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        broken = [reply for reply in replies if reply.has_error()]
        if broken:
            raise RuntimeError(f"round {server_round}: a device failed: {broken[0].error.reason}")
        merged = super().aggregate_train(server_round, replies)
        self.seconds.append(time.perf_counter() - self.begun)
        return merged


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    values = settings["megabytes"] * 250_000 // TENSORS
    random = np.random.default_rng(0)
    arrays = ArrayRecord([random.standard_normal(values, dtype=np.float32) for _ in range(TENSORS)])
    devices = settings["devices"]
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=settings["rounds"])
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    with open(settings["out"], "w") as file:
        json.dump({"seconds": strategy.seconds, "peak_mb": peak_mb}, file)
