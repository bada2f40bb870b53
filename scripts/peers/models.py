"""A model's work in llama.cpp and in PyTorch with PEFT, in this process: models.py KIND SHAPE, in the peers' environment.

Weights are random: time does not depend on them. All use as many threads as there are cores for them, ours are told the same
number. llama.cpp's weights are Q4_0, 4 bits in blocks of 32; ours beside them have 4 bits in blocks of 128; PyTorch trains in
32 bits. Called by ../bench_peers.py.
"""

import ctypes
import json
import os
import pathlib
import resource
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCH = ROOT / "target" / "bench"
# As `edge-client bench` has them.
PREFILL, BEHIND, DECODE, POLICY, SAMPLE, SAMPLES, TRAIN, RANK = 512, 448, 64, 300, 60, 32, 256, 8
# What this process may run on, which in a container is less than what the machine has.
THREADS = len(os.sched_getaffinity(0))


def config(shape):
    return json.loads((ROOT / "scripts" / "shapes" / f"{shape}.json").read_text())


def write_gguf(shape):
    """A model of the shape for llama.cpp, Q4_0, made once."""
    import gguf
    import numpy as np

    path = BENCH / f"{shape}.gguf"
    if path.exists():
        return path
    BENCH.mkdir(parents=True, exist_ok=True)
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


if __name__ == "__main__":
    kind, shape = sys.argv[1:]
    program, work = kind.split(" ", 1)
    if work == "gguf":
        write_gguf(shape)
    else:
        rate = llama(shape, work) if program == "llama.cpp" else pytorch(shape)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(json.dumps({"rate": rate, "peak_mb": peak_mb}))
