"""Starts `edge-client serve` on a free port of the loopback, in a state directory of its own; for check_openai.py and
bench-serve."""

import contextlib
import json
import os
import subprocess
import tempfile


@contextlib.contextmanager
def endpoint(program, *options, policy=None, env=None):
    """Yields what it says of itself when it answers, with its state directory; ends it afterwards."""
    with tempfile.TemporaryDirectory() as state:
        if policy:
            with open(os.path.join(state, "policy.toml"), "w") as file:
                file.write(policy)
        keys = os.path.join(state, "..", os.path.basename(state) + "-keys")
        own = {**os.environ, "COMMONWEAL_KEYS": os.path.abspath(keys), "RUST_LOG": "warn", **(env or {})}
        command = [program, "serve", "--listen", "127.0.0.1:0", "--dir", state, "--json", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own)
        try:
            line = process.stdout.readline()
            if not line:
                raise SystemExit(f"{' '.join(command)} ended with {process.wait()}")
            yield {**json.loads(line), "dir": state}
        finally:
            process.terminate()
            process.wait(timeout=30)
