"""Times the work of a device and of a round in other programs, beside ours. Called by scripts/bench-peers.

Every measurement is a process of its own, so that its peak memory is its own. The programs take turns within each
repetition; the median over the repetitions counts. A pair of figures (ours and a peer's) is always of one session, and
pairs are kept in docs/performance.json, so that a part of the table can be measured again.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from peers import plot, rounds  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / "target"
EDGE_CLIENT = TARGET / "release" / "edge-client"
RESULTS, DOCUMENT, PLOT = (ROOT / "docs" / f"performance.{suffix}" for suffix in ("json", "md", "svg"))
BEGIN, END = "<!-- scripts/bench-peers writes from here -->", "<!-- to here -->"
FAILED, UNAVAILABLE = 1, 5

# peer → (environment, what must be importable there, pip calls)
PEERS = {
    "llama.cpp": (
        "venv-peers", "gguf, llama_cpp",
        # Built here, for this processor.
        [["gguf==0.19.0"], ["--no-binary", "llama-cpp-python", "llama-cpp-python==0.3.36"]],
    ),
    "pytorch": ("venv-peers", "peft, torch, transformers", [["torch==2.6.0", "peft==0.15.2", "transformers==4.51.3"]]),
    "flower": ("venv-flower", "flwr, numpy", [["flwr==1.41.0", "numpy==2.4.6"]]),
    "nvflare": ("venv-nvflare", "nvflare, numpy", [["nvflare==2.9.0", "numpy==2.4.6"]]),
}
ROUND_PEERS = {"flower": "Flower 1.41", "nvflare": "NVIDIA FLARE 2.9, simulator"}
# (work, our kind, the peer, its kind, how it is named, unit, how many times as fast we mean to be)
WORK = [
    ("prefill 512", "prefill", "llama.cpp", "llama.cpp prefill", "llama.cpp", "tokens/s", 1.2),
    ("decode at 512", "decode", "llama.cpp", "llama.cpp decode", "llama.cpp", "tokens/s", 1.3),
    ("screening", "screen", "llama.cpp", "llama.cpp screen-whole", "llama.cpp, whole prompts", "samples/s", 5.0),
    ("screening", "screen", "llama.cpp", "llama.cpp screen-cached", "llama.cpp, prompt cache", "samples/s", 1.5),
    ("revision", "revise", "llama.cpp", "llama.cpp decode", "llama.cpp decode", "tokens/s", 2.5),
    ("LoRA step, 256 tokens", "train", "pytorch", "PyTorch train", "PyTorch eager + PEFT", "tokens/s", 1.6),
    ("LoRA step in little memory, 256 tokens", "train-frugal", "pytorch", "PyTorch train", "PyTorch eager + PEFT", "tokens/s", 1.6),
    (
        "LoRA step, upper half of the layers", "train-upper", "pytorch", "PyTorch train",
        "PyTorch eager + PEFT, all layers", "tokens/s", 3.0,
    ),
]
# Longest that a round of 20 MB and four devices is to take, whoever the peer.
ROUND_TARGET, ROUND_TARGET_SECONDS = (20, 4), 1.0
# An update packed at 8 bits takes one byte a value and its share of a scale, an adapter four: of an adapter of so many
# times the payload's size, the update alone is as large as the payload.
ADAPTER_FOR_UPDATE = 4


def python(peer):
    return TARGET / PEERS[peer][0] / "bin" / "python"


def install(peer):
    """Makes a peer's environment if it is not there yet; whether it is there now."""
    environment, modules, calls = PEERS[peer]
    there = lambda: subprocess.run([python(peer), "-c", f"import {modules}"], capture_output=True).returncode == 0
    if python(peer).exists() and there():
        return True
    print(f"installing {peer} into target/{environment}", file=sys.stderr)
    steps = [[sys.executable, "-m", "venv", TARGET / environment]]
    steps += [[python(peer), "-m", "pip", "install", "--quiet", *call] for call in calls]
    return all(subprocess.run(step, stdout=sys.stderr).returncode == 0 for step in steps) and there()


class Session:
    """The pairs to measure, and what came of each."""

    def __init__(self, total):
        self.done, self.total, self.begun = 0, total, time.monotonic()
        self.pairs, self.failed = {}, set()

    def progress(self, name, told):
        self.done += 1
        left = (time.monotonic() - self.begun) / self.done * (self.total - self.done)
        print(f"{self.done}/{self.total}  {name}: {told}  ({left:.0f} s left)", file=sys.stderr)

    def fail(self, name, shape, why):
        print(f"{shape}  {name}: {why}", file=sys.stderr)
        self.failed.add((name, shape))

    def keep(self, work, shape, peer, **facts):
        """The pair of that name, made when first asked for."""
        pair = dict(facts, work=work, shape=shape, peer=peer, ours=[], theirs=[])
        return self.pairs.setdefault(f"{work} | {shape} | {peer}", pair)


def measure_models(peers, shapes, repeats):
    told = subprocess.run([EDGE_CLIENT, "bench", "--help"], capture_output=True, text=True, check=True).stdout
    is_known = lambda kind: re.search(rf"^\s+- {re.escape(kind)}:", told, re.MULTILINE)
    work = [row for row in WORK if row[2] in peers and is_known(row[1])]
    for row in WORK:
        if row[2] in peers and row not in work:
            print(f"left out: {row[0]}, since edge-client bench has no kind {row[1]}", file=sys.stderr)
    kinds = list(dict.fromkeys(kind for row in work for kind in (f"ours {row[1]}", row[3])))
    session = Session(repeats * len(shapes) * len(kinds))
    packages = {}
    for shape in shapes if work else []:
        command = [ROOT / "scripts" / "shape-package", shape]
        packages[shape] = ROOT / subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        if "llama.cpp" in peers:
            make = [python("llama.cpp"), ROOT / "scripts/peers/models.py", "llama.cpp gguf", shape]
            if subprocess.run(make).returncode != 0:
                session.fail("llama.cpp", shape, "its model cannot be made")
    for repetition in range(repeats):
        for shape in shapes:
            figures = {kind: measured for kind in kinds if (measured := attempt(session, kind, shape, packages[shape]))}
            for name, ours, _, theirs, peer, unit, target in work:
                both = {"ours": figures.get(f"ours {ours}"), "theirs": figures.get(theirs)}
                if not all(both.values()):
                    continue
                pair = session.keep(name, shape, peer, unit=unit, target=target)
                for side, figure in both.items():
                    pair[side].append({"figure": figure["rate"], "peak_mb": figure["peak_mb"]})
    return session


def attempt(session, kind, shape, package):
    """One kind's figures. What failed once is named, left out from then on, and costs the others nothing."""
    program = kind.split(" ", 1)[0]
    if (kind, shape) in session.failed or (program, shape) in session.failed:
        return None
    try:
        figures = measure_model(kind, shape, package)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, KeyError) as error:
        session.fail(kind, shape, error)
        return None
    session.progress(f"{shape}  {kind}", f"{figures['rate']:.1f}")
    return figures


def measure_model(kind, shape, package):
    program, work = kind.split(" ", 1)
    if program == "ours":
        command = [EDGE_CLIENT, "bench", "--here", "--json", "--repeats", "1", "--only", work, "--package", package]
        command += ["--threads", cores()]
    else:
        peer = "llama.cpp" if program == "llama.cpp" else "pytorch"
        command = [python(peer), ROOT / "scripts/peers/models.py", kind, shape]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout.decode().strip().split("\n")[-1])
    return {"rate": float(figures["rate"]), "peak_mb": figures["peak_mb"]}


def measure_rounds(peers, payloads, repeats, rounds_each):
    """Each repetition is a session of every program, with a round of its own to warm up; all rounds count alike."""
    peers = [peer for peer in ROUND_PEERS if peer in peers]
    session = Session(repeats * len(payloads) * (2 + len(peers)) if peers else 0)

    def measure(name, call, *arguments):
        if (name, "rounds") in session.failed:
            return None
        try:
            figures = call(*arguments, rounds_each)
        except (rounds.Failed, OSError, subprocess.SubprocessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            session.failed.add((name, "rounds"))
            return None
        session.progress(f"{name}  {arguments[-2]} MB × {arguments[-1]}", f"{statistics.median(figures['seconds']):.2f} s")
        return figures

    for repetition in range(repeats if peers else 0):
        for megabytes, devices in payloads:
            target = ROUND_TARGET_SECONDS if (megabytes, devices) == ROUND_TARGET else None
            adapters = {"adapter": megabytes, "each way": ADAPTER_FOR_UPDATE * megabytes}
            mine = {what: measure("ours", rounds.ours, adapter, devices) for what, adapter in adapters.items()}
            for peer in peers:
                figures = measure(peer, getattr(rounds, peer), TARGET / PEERS[peer][0], megabytes, devices)
                for what in adapters:
                    if not (mine[what] and figures):
                        continue
                    facts = dict(unit="s a round", target_seconds=target, megabytes=megabytes, devices=devices, what=what)
                    work = f"a round, {megabytes} MB {what} × {devices}"
                    shape = f"{mine[what]['down_mb']:.0f} MB down, {mine[what]['up_mb']:.1f} up"
                    pair = session.keep(work, shape, ROUND_PEERS[peer], **facts)
                    for runs, found in ((pair["ours"], mine[what]), (pair["theirs"], figures)):
                        runs += [{"figure": seconds, "peak_mb": found["peak_mb"]} for seconds in found["seconds"]]
    return session


def medians(pair):
    """A pair with the median of its runs in the place of the runs."""
    def median(runs, key):
        values = [run[key] for run in runs if run[key] is not None]
        return statistics.median(values) if values else None

    sides = {side: {key: median(pair[side], key) for key in ("figure", "peak_mb")} for side in ("ours", "theirs")}
    return dict(pair, **sides, runs=min(len(pair["ours"]), len(pair["theirs"])), machine=machine())


def is_round(pair):
    return "megabytes" in pair


def speed(pair):
    """How many times as fast as the peer, and how many we mean to be, if a number was set."""
    mine, theirs = pair["ours"]["figure"], pair["theirs"]["figure"]
    if is_round(pair):
        seconds = pair["target_seconds"]
        return theirs / mine, theirs / seconds if seconds else None
    return mine / theirs, pair["target"]


def table(pairs):
    lines = ["| work | shape | ours | peer | times | peak MB, ours | peer's |", "|---|---|---|---|---|---|---|"]
    for pair in pairs:
        digits = 2 if is_round(pair) else 1
        mine, theirs = (f"{pair[side]['figure']:.{digits}f}" for side in ("ours", "theirs"))
        peaks = [pair[side]["peak_mb"] for side in ("ours", "theirs")]
        peaks = ["–" if peak is None else f"{peak:.0f}" for peak in peaks]
        cells = [pair["work"], pair["shape"], f"{mine} {pair['unit']}", f"{theirs} ({pair['peer']})", f"{speed(pair)[0]:.2f}", *peaks]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slopes(pairs):
    """What a round costs before its first byte, and a MB, from the smallest and the largest payload of one kind."""
    points = {}
    for pair in filter(is_round, pairs):
        for name, side in ((f"ours, {pair['what']}", "ours"), (pair["peer"], "theirs")):
            points.setdefault((name, pair["devices"]), {})[pair["megabytes"]] = pair[side]["figure"]
    lines = []
    for (name, devices), found in points.items():
        (small, fast), (large, slow) = min(found.items()), max(found.items())
        if small < large:
            slope = (slow - fast) / (large - small)
            lines.append(f"- {name}: {fast - slope * small:.2f} s and {slope:.3f} s a MB, {devices} devices")
    head = "What a round costs whatever its size, and for each MB of payload (the line through the smallest and the largest):"
    return "\n".join(["", head, "", *lines]) if lines else ""


def cores():
    """Threads of every program: what this process may run on."""
    return len(os.sched_getaffinity(0))


def machine():
    name = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "unknown processor")
    return f"{cores()} cores, {name}"


def in_order(results):
    """Pairs as the table has them: the models shape by shape, then the rounds from the smallest."""
    works = {(row[0], row[4]): place for place, row in enumerate(WORK)}

    def place(pair):
        if is_round(pair):
            return (1, pair["devices"], pair["megabytes"], pair["what"], pair["peer"])
        return (0, "qwen" in pair["shape"], pair["shape"], works.get((pair["work"], pair["peer"]), 0))

    return sorted(results.values(), key=place)


def write(results):
    """The figures, the table and the plot into docs/."""
    pairs = in_order(results)
    runs = sorted({pair["runs"] for pair in pairs})
    counts = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    said = f"Medians of {counts} on {'; '.join(sorted({pair['machine'] for pair in pairs}))}."
    text = f"{said}\n\n{table(pairs)}\n{slopes(pairs)}".rstrip()
    before, rest = DOCUMENT.read_text().split(BEGIN)
    _, after = rest.split(END, 1)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n\n![Times as fast as others]({PLOT.name})\n{END}{after}")
    PLOT.write_text(plot.draw([(f"{pair['work']}, {pair['shape']}", pair["peer"], *speed(pair)) for pair in pairs]))
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def payloads(text):
    found = [re.fullmatch(r"(\d+)x(\d+)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"expected MBxDEVICES with commas between, such as 1x4,20x4, got {text}")
    return [(int(match[1]), int(match[2])) for match in found]


def chosen(text):
    groups = {"rounds": list(ROUND_PEERS), "models": ["llama.cpp", "pytorch"]}
    names = [name for part in text.split(",") for name in groups.get(part, [part])]
    wrong = [name for name in names if name not in PEERS]
    if wrong:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join([*PEERS, *groups])}, got {wrong[0]}")
    return names


def arguments():
    parser = argparse.ArgumentParser(prog="scripts/bench-peers", description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=chosen, default=list(PEERS), metavar="PEER,…", help="llama.cpp, pytorch, flower, nvflare, models, rounds")
    parser.add_argument("--shapes", default="smollm2-135m,qwen2.5-0.5b", help="of the models")
    parser.add_argument("--repeats", type=int, default=5, help="of each kind of work of a model")
    parser.add_argument("--payloads", type=payloads, default=payloads("1x4,20x4"), metavar="MBxDEVICES,…", help="of the rounds")
    parser.add_argument("--sessions", type=int, default=2, help="of rounds, each started anew")
    parser.add_argument("--rounds", type=int, default=3, help="of each session, after one that does not count")
    parser.add_argument("--no-write", action="store_true", help="leave docs/ alone")
    return parser.parse_args()


def main():
    a = arguments()
    # What was started is ended on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    there = [peer for peer in a.only if install(peer)]
    missing = [peer for peer in a.only if peer not in there]
    for peer in missing:
        print(f"left out: {peer} cannot be installed", file=sys.stderr)
    sessions = [
        measure_models(there, a.shapes.split(","), a.repeats),
        measure_rounds(there, a.payloads, a.sessions, a.rounds),
    ]
    fresh = {name: medians(pair) for session in sessions for name, pair in session.pairs.items()}
    print(table(in_order(fresh)), slopes(in_order(fresh)), sep="\n")
    if fresh and not a.no_write:
        write({**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **fresh})
    failed = set().union(*(session.failed for session in sessions))
    for name, what in sorted(failed):
        print(f"failed: {name}, {what}", file=sys.stderr)
    return FAILED if failed else UNAVAILABLE if missing else 0


if __name__ == "__main__":
    sys.exit(main())
