"""Times the work of a device in llama.cpp and in PyTorch with PEFT, beside ours. Called by scripts/bench-peers.

Every measurement is a process of its own, so that its peak memory is its own. The programs take turns within each
repetition; the median over the repetitions counts. Weights are random: time does not depend on them. All use as many
threads as the machine has cores, and 4-bit weights in blocks of 32, but PyTorch, which trains in 32 bits.
"""

import argparse
import ctypes
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCH = ROOT / "target" / "bench"
EDGE_CLIENT = ROOT / "target" / "release" / "edge-client"
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- scripts/bench-peers writes from here -->", "<!-- to here -->"
# As `edge-client bench` has them.
PREFILL, BEHIND, DECODE, POLICY, SAMPLE, SAMPLES, TRAIN, RANK = 512, 448, 64, 300, 60, 32, 256, 8
THREADS = os.cpu_count() or 1
# work → (our kind, the peer's kinds, unit)
WORK = {
    "prefill 512": ("prefill", ["llama.cpp prefill"], "tokens/s"),
    "decode at 512": ("decode", ["llama.cpp decode"], "tokens/s"),
    "screening": ("screen", ["llama.cpp screen-whole", "llama.cpp screen-cached"], "samples/s"),
    "LoRA step, 256 tokens": ("train", ["PyTorch train"], "tokens/s"),
}
PEER_NAMES = {
    "llama.cpp prefill": "llama.cpp", "llama.cpp decode": "llama.cpp", "llama.cpp screen-whole": "llama.cpp, whole prompts",
    "llama.cpp screen-cached": "llama.cpp, prompt cache", "PyTorch train": "PyTorch eager + PEFT",
}


def config(shape):
    return json.loads((ROOT / "scripts" / "shapes" / f"{shape}.json").read_text())


def write_gguf(shape):
    """A model of the shape for llama.cpp, Q4_0, made once."""
    import gguf
    import numpy as np

    path = BENCH / f"{shape}.gguf"
    if path.exists():
        return path
    c = config(shape)
    qwen = c["model_type"] == "qwen2"
    hidden, inner, heads, kv = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"], c["num_key_value_heads"]
    head = hidden // heads
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, c["model_type"])
    writer.add_vocab_size(c["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_rope_dimension_count(head)
    random = np.random.default_rng(0)

    def matrix(name, rows, columns):
        values = random.standard_normal((rows, columns), dtype=np.float32) / columns**0.5
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", c["vocab_size"], hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(c["num_hidden_layers"]):
        for name, rows in (("attn_q", heads * head), ("attn_k", kv * head), ("attn_v", kv * head)):
            matrix(f"blk.{i}.{name}.weight", rows, hidden)
            if qwen:
                writer.add_tensor(f"blk.{i}.{name}.bias", np.zeros(rows, np.float32))
        matrix(f"blk.{i}.attn_output.weight", hidden, heads * head)
        matrix(f"blk.{i}.ffn_gate.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_up.weight", inner, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(path)
    return path


def llama(shape, work):
    """A rate of llama.cpp, after one run that is not counted."""
    import llama_cpp as api

    vocabulary = config(shape)["vocab_size"]
    api.llama_backend_init()
    silent = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(silent, ctypes.c_void_p(0))
    model = api.llama_model_load_from_file(str(write_gguf(shape)).encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 1024, 512, 512
    options.n_threads = options.n_threads_batch = THREADS
    context = api.llama_init_from_model(model, options)
    memory = api.llama_get_memory(context)

    def read(count, seed=1):
        tokens = (api.llama_token * count)(*((7919 * seed + 31 * i) % vocabulary for i in range(count)))
        if api.llama_decode(context, api.llama_batch_get_one(tokens, count)) != 0:
            raise SystemExit("llama_decode failed")

    def clear(start=0):
        if start == 0:
            api.llama_memory_clear(memory, True)
        else:
            api.llama_memory_seq_rm(memory, 0, start, -1)

    def prefill():
        clear()
        begun = time.perf_counter()
        read(PREFILL)
        return PREFILL / (time.perf_counter() - begun)

    def decode():
        clear()
        read(BEHIND)
        begun = time.perf_counter()
        for i in range(DECODE):
            read(1, i)
        return DECODE / (time.perf_counter() - begun)

    def screen(cached):
        clear()
        begun = time.perf_counter()
        if cached:
            read(POLICY)
        for i in range(SAMPLES):
            clear(POLICY if cached else 0)
            read(SAMPLE if cached else POLICY + SAMPLE, i)
        return SAMPLES / (time.perf_counter() - begun)

    run = {
        "prefill": prefill, "decode": decode, "screen-whole": lambda: screen(False), "screen-cached": lambda: screen(True),
    }[work]
    if work != "screen-whole":  # long enough to be warm by itself
        run()
    return run()


def pytorch(shape):
    """Tokens a second of a LoRA step, AdamW included: PEFT on every linear, 32 bits, eager."""
    import peft
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config(shape)))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, config(shape)["vocab_size"], (1, TRAIN))

    def step():
        begun = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return TRAIN / (time.perf_counter() - begun)

    step()
    return step()


def measure_here(kind, shape):
    program, work = kind.split(" ", 1)
    rate = llama(shape, work) if program == "llama.cpp" else pytorch(shape)
    print(json.dumps({"rate": rate, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}))


def measure_apart(kind, shape, package):
    if kind.startswith("ours "):
        command = [EDGE_CLIENT, "bench", "--here", "--json", "--repeats", "1", "--only", kind.split(" ")[1], "--package", package]
    else:
        command = [sys.executable, __file__, "--here", kind, "--shapes", shape]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.decode().strip().splitlines()[-1])


def table(results):
    lines = ["| work | shape | ours | peer | times | peak MB, ours | peer's |", "|---|---|---|---|---|---|---|"]
    middle = lambda runs, key: statistics.median(run[key] for run in runs)
    for shape, figures in results.items():
        for work, (kind, peers, unit) in WORK.items():
            ours = figures[f"ours {kind}"]
            for peer in peers:
                mine, theirs = middle(ours, "rate"), middle(figures[peer], "rate")
                lines.append(
                    f"| {work} | {shape} | {mine:.1f} {unit} | {theirs:.1f} ({PEER_NAMES[peer]}) | {mine / theirs:.2f} | "
                    f"{middle(ours, 'peak_mb'):.0f} | {middle(figures[peer], 'peak_mb'):.0f} |"
                )
    return "\n".join(lines)


def machine():
    name = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), "unknown processor")
    return f"{THREADS} cores, {name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="smollm2-135m,qwen2.5-0.5b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="leave docs/performance.md alone")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.here:
        return measure_here(a.here, a.shapes)
    kinds = [kind for ours, peers, _ in WORK.values() for kind in (f"ours {ours}", *peers)]
    shapes = a.shapes.split(",")
    packages = {}
    for shape in shapes:
        packages[shape] = subprocess.run([ROOT / "scripts" / "shape-package", shape], stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        write_gguf(shape)
    results = {shape: {kind: [] for kind in kinds} for shape in shapes}
    done, total, begun = 0, a.repeats * len(shapes) * len(kinds), time.monotonic()
    for repetition in range(1, a.repeats + 1):
        for shape in shapes:
            for kind in kinds:
                results[shape][kind].append(measure_apart(kind, shape, ROOT / packages[shape]))
                done += 1
                left = (time.monotonic() - begun) / done * (total - done)
                print(f"{done}/{total}  {shape}  {kind}: {results[shape][kind][-1]['rate']:.1f}  ({left:.0f} s left)", file=sys.stderr)
    text = table(results)
    print(text)
    if not a.no_write:
        document = DOCUMENT.read_text()
        before, rest = document.split(BEGIN)
        _, after = rest.split(END, 1)
        said = f"Medians of {a.repeats} on {machine()}.\n\n{text}"
        DOCUMENT.write_text(f"{before}{BEGIN}\n{said}\n{END}{after}")


if __name__ == "__main__":
    main()
