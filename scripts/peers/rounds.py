"""Rounds of communication in ours, in Flower and in NVIDIA FLARE: a payload goes to each device, as much comes back, and
the results are averaged. Called by ../bench_peers.py.

Times are the servers' own, a round's each, so that starting processes before the first round does not count. What is
started here is ended here, however it goes.
"""

import contextlib
import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
HERE = pathlib.Path(__file__).resolve().parent
WARM_UP_ROUNDS = 1
SECONDS_MAX = 1200
STARTED_SECONDS_MAX = 120


class Failed(Exception):
    """A peer did not do its rounds; the text says why."""


def ours(megabytes, devices, rounds):
    """`megabytes` is the adapter's; what crosses the wire is in the figures."""
    command = [ROOT / "target/release/round-bench", "--json"]
    command += ["--adapter-mb", megabytes, "--devices", devices, "--rounds", rounds]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, timeout=SECONDS_MAX)
    if done.returncode != 0:
        raise Failed(f"round-bench ended with {done.returncode}")
    told = json.loads(done.stdout)
    return {
        "seconds": [times["whole"] for times in told["rounds"]], "peak_mb": told["aggregator_peak_mb"],
        "down_mb": told["down_bytes"] / 1e6, "up_mb": told["up_bytes"] / 1e6,
    }


def flower(venv, megabytes, devices, rounds):
    """A SuperLink, a SuperNode for each device, and `flwr run`, all as processes; plaintext, state in memory."""
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as started:
        out = pathlib.Path(home) / "rounds.json"
        first, *ports = free_ports(1 + devices)
        address = f"127.0.0.1:{first}"
        (pathlib.Path(home) / "config.toml").write_text(f'[superlink.bench]\naddress = "{address}"\ninsecure = true\n')
        environment = dict(os.environ, FLWR_HOME=home, FLWR_TELEMETRY_ENABLED="0")
        # The programs start each other by name.
        environment["PATH"] = f"{venv / 'bin'}{os.pathsep}{environment['PATH']}"
        log = started.enter_context(open(pathlib.Path(home) / "log", "wb"))

        def start(*command):
            return started.enter_context(running([str(part) for part in command], env=environment, stdout=log, stderr=log))

        link = start(
            venv / "bin/flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", first,
            "--disable-runtime-dependency-installation",
        )
        wait_for(first, link)
        for port in ports:
            start(venv / "bin/flower-supernode", "--insecure", "--superlink", address, "--port", port)
        settings = f"megabytes={megabytes} devices={devices} rounds={WARM_UP_ROUNDS + rounds} out='{out}'"
        # The app is copied: Flower builds it where it lies.
        app = shutil.copytree(HERE / "flower", pathlib.Path(home) / "app", ignore=shutil.ignore_patterns("__pycache__"))
        command = [venv / "bin/flwr", "run", app, "bench", "--stream", "-c", settings]
        run = start(*command)
        try:
            run.wait(SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise Failed(f"Flower's rounds took more than {SECONDS_MAX} s") from None
        if not out.exists():
            log.flush()
            raise Failed(f"Flower's run ended without figures:\n{tail(log.name)}")
        told = json.loads(out.read_text())
        # The server is two processes: the link keeps the messages, the app averages.
        return {"seconds": told["seconds"][WARM_UP_ROUNDS:], "peak_mb": told["peak_mb"] + peak_mb(link.pid)}


def nvflare(venv, megabytes, devices, rounds):
    """FLARE's simulator: a server's and the devices' processes, plaintext; the start of each round from the server's log."""
    with tempfile.TemporaryDirectory() as home:
        command = [venv / "bin/python", HERE / "nvflare/job.py", megabytes, devices, WARM_UP_ROUNDS + rounds, home]
        log = pathlib.Path(home) / "log"
        with open(log, "wb") as output, running([str(part) for part in command], stdout=output, stderr=output) as job:
            peak, end = 0.0, time.monotonic() + SECONDS_MAX
            while job.poll() is None:
                if time.monotonic() > end:
                    raise Failed(f"FLARE's rounds took more than {SECONDS_MAX} s")
                peak = max([peak, *(peak_mb(one) for one in marked(job.mark) if is_server(one))])
                time.sleep(0.5)
        server = pathlib.Path(home) / "rounds/server/log.json"
        if job.returncode != 0 or not server.exists():
            raise Failed(f"FLARE's job ended with {job.returncode}:\n{tail(log)}")
        marks = []
        for told in (json.loads(line) for line in server.read_text().split("\n") if line):
            if re.search(r"Round \d+ started\.|Finished FedAvg\.", told["message"]):
                marks.append(datetime.datetime.strptime(told["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp())
        seconds = [after - before for before, after in zip(marks, marks[1:])]
        if len(seconds) != WARM_UP_ROUNDS + rounds:
            raise Failed(f"FLARE's log has {len(seconds)} rounds, expected {WARM_UP_ROUNDS + rounds}")
        return {"seconds": seconds[WARM_UP_ROUNDS:], "peak_mb": peak}


def is_server(process):
    """Of the simulator's processes, the devices' are called workers and the rest is the server."""
    with contextlib.suppress(OSError):
        return b"simulator_worker" not in pathlib.Path(f"/proc/{process}/cmdline").read_bytes()
    return False


@contextlib.contextmanager
def running(command, env=None, **options):
    """A process; it and whatever it started are ended at the end. They are known by a mark in their environment, since
    the peers' programs put each other into sessions of their own."""
    mark = uuid.uuid4().hex
    environment = dict(env or os.environ, COMMONWEAL_BENCH_MARK=mark)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, **options)
    process.mark = mark
    try:
        yield process
    finally:
        for number, patience_seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            end = time.monotonic() + patience_seconds
            for one in marked(mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one, number)
            while process.poll() is None or marked(mark):
                if time.monotonic() > end:
                    break
                time.sleep(0.1)


def marked(mark):
    """The processes with this mark that still run."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"COMMONWEAL_BENCH_MARK={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def free_ports(count):
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(port, process):
    """Until somebody listens."""
    end = time.monotonic() + STARTED_SECONDS_MAX
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise Failed(f"nobody listens on port {port}")


def peak_mb(process):
    """The most memory that a process held so far; 0 of one that has ended."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+)", pathlib.Path(f"/proc/{process}/status").read_text())
        return int(found[1]) * 1024 / 1e6 if found else 0.0
    return 0.0


def tail(path):
    return "\n".join(pathlib.Path(path).read_text(errors="replace").splitlines()[-15:])
