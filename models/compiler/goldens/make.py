"""Writes the golden checkpoints and values that tests/goldens.rs compares with.

Run with Python 3, torch, numpy, safetensors and tokenizers: `python make.py`. The output is committed; run it
again only to change the goldens, all or those of the variants that are named. `--transformers` also holds the reference against Hugging Face's implementation,
where that is installed.

Everything here is written apart from the Rust code: the model in torch with autograd, the quantizer and its layout
in numpy. Three checkpoints of random weights:

- tied:   BF16, one file, grouped queries, tied head, default rotary frequencies;
- untied: F16, two shards, separate head, Llama 3's stretched rotary frequencies;
- filled: F32, as many heads of keys as of queries, and rows of 48 and 80 weights, which no block divides.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = pathlib.Path(__file__).parent
RANK, SCALE, BLOCK = 4, 1.5, 32
BATCH, TIME = 3, 9
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"]
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 5,
}
VARIANTS = {
    "tied": {**BASE, "head_dim": 16, "tie_word_embeddings": True},
    "untied": {
        **BASE,
        "head_dim": 32,
        "tie_word_embeddings": False,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "filled": {
        **BASE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "tie_word_embeddings": True,
    },
}
DTYPES = {"tied": torch.bfloat16, "untied": torch.float16, "filled": torch.float32}
# Bits of a weight and weights of a block.
WIDTHS = dict.fromkeys(VARIANTS, [(32, BLOCK), (8, BLOCK), (4, BLOCK)]) | {
    "filled": [(32, BLOCK), (8, 64), (4, 64), (4, 128)]
}
TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]
NAMES = {t: f"self_attn.{t}_proj" for t in "qkvo"} | {t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}


def tokenizer():
    """One token per character: enough to load, to fit and to encode text."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate(SPECIAL + characters + ["<|unknown|>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(SPECIAL)
    return made.to_str(pretty=False)


def shapes(c):
    """Rows and columns of each linear layer of a block."""
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    query, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    return {
        "q": (query, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, query),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip


def random_weights(c, generator, dtype):
    def matrix(rows, columns, size=1.0):
        return (torch.randn(rows, columns, generator=generator) * size / columns**0.5).to(dtype)

    def norm():
        return (1 + 0.2 * torch.randn(c["hidden_size"], generator=generator)).to(dtype)

    weights = {"model.embed_tokens.weight": matrix(c["vocab_size"], c["hidden_size"], 2.0)}
    for i in range(c["num_hidden_layers"]):
        for target, (rows, columns) in shapes(c).items():
            weights[f"model.layers.{i}.{NAMES[target]}.weight"] = matrix(rows, columns)
        weights[f"model.layers.{i}.input_layernorm.weight"] = norm()
        weights[f"model.layers.{i}.post_attention_layernorm.weight"] = norm()
    weights["model.norm.weight"] = norm()
    if not c["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(c["vocab_size"], c["hidden_size"], 2.0)
    return weights


def quantize(matrix, bits, block=BLOCK):
    """Codes [rows, blocks, bytes], scales [rows, blocks] and the matrix that they stand for. A row that is no whole
    number of blocks is filled up with zeros."""
    zero = 1 << (bits - 1)
    rows, columns = matrix.shape
    per_row = -(-columns // block)
    whole = np.pad(matrix.numpy().astype(np.float32), ((0, 0), (0, per_row * block - columns)))
    blocks = whole.reshape(-1, block)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1, keepdims=True), 1)
    best_gain = np.zeros((len(blocks), 1))
    best_offsets = np.zeros(blocks.shape, np.int64)
    scales = np.zeros((len(blocks), 1), np.float32)
    for attempt in range(-9, 10):
        end = np.float32(zero) + np.float32(0.1) * np.float32(attempt)
        inverse = -end / extreme
        offsets = np.clip(np.rint(blocks * inverse).astype(np.int64), -zero, zero - 1)
        product = (blocks.astype(np.float64) * offsets).sum(1, keepdims=True)
        square = (offsets.astype(np.float64) ** 2).sum(1, keepdims=True)
        gain = product**2 / square
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_offsets = np.where(better, offsets, best_offsets)
        scales = np.where(better, (product / square).astype(np.float32), scales)
    codes = (best_offsets + zero).astype(np.uint8)
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    stood_for = (scales * best_offsets.astype(np.float32)).reshape(rows, -1)[:, :columns]
    return codes.reshape(rows, per_row, -1), scales.reshape(rows, per_row), torch.from_numpy(stood_for)


def fused(c, weights):
    """The matrices as the package stores them, by the package's names."""
    stored = {"embed": [weights["model.embed_tokens.weight"]]}
    for i in range(c["num_hidden_layers"]):
        part = lambda *targets, i=i: [weights[f"model.layers.{i}.{NAMES[t]}.weight"] for t in targets]
        stored[f"layers.{i}.qkv"] = part("q", "k", "v")
        stored[f"layers.{i}.o"] = part("o")
        stored[f"layers.{i}.gate_up"] = part("gate", "up")
        stored[f"layers.{i}.down"] = part("down")
    if "lm_head.weight" in weights:
        stored["head"] = [weights["lm_head.weight"]]
    return {name: torch.cat(parts).float() for name, parts in stored.items()}


def frequencies(c):
    """Angle per position of each pair, after the Llama 3.1 reference code (apply_scaling)."""
    head = c["head_dim"]
    plain = 1.0 / c["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float64) / head)
    scaling = c.get("rope_scaling")
    if scaling is None:
        return plain
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    stretched = []
    for frequency in plain.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            stretched.append(frequency)
        elif wavelength > context / low:
            stretched.append(frequency / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            stretched.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.tensor(stretched, dtype=torch.float64)


def logits(c, weights, adapter, ids):
    """Logits [batch, time, vocabulary] in 64-bit floats."""
    batch, time = ids.shape
    heads, kv_heads, head = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    angles = torch.outer(torch.arange(time, dtype=torch.float64), frequencies(c))
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]) * weights[name]

    def linear(x, i, target):
        y = x @ weights[f"model.layers.{i}.{NAMES[target]}.weight"].T
        a, b = adapter[f"layers.{i}.{target}.a"], adapter[f"layers.{i}.{target}.b"]
        return y + SCALE * (x @ a.T) @ b.T

    def split(x, count):
        return x.view(batch, time, count, head).transpose(1, 2)

    x = weights["model.embed_tokens.weight"][ids]
    ahead = torch.full((time, time), float("-inf"), dtype=torch.float64).triu(1)
    for i in range(c["num_hidden_layers"]):
        n = norm(x, f"model.layers.{i}.input_layernorm.weight")
        q = rotate(split(linear(n, i, "q"), heads))
        k = rotate(split(linear(n, i, "k"), kv_heads)).repeat_interleave(heads // kv_heads, 1)
        v = split(linear(n, i, "v"), kv_heads).repeat_interleave(heads // kv_heads, 1)
        attention = (q @ k.transpose(2, 3) / head**0.5 + ahead).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).reshape(batch, time, heads * head), i, "o")
        n = norm(x, f"model.layers.{i}.post_attention_layernorm.weight")
        x = x + linear(F.silu(linear(n, i, "gate")) * linear(n, i, "up"), i, "down")
    x = norm(x, "model.norm.weight")
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def reference(c, weights, adapter, ids, targets, row_weights):
    """Everything that the two graphs compute."""
    weights = {name: value.double() for name, value in weights.items()}
    adapter = {name: value.double().requires_grad_() for name, value in adapter.items()}
    scores = logits(c, weights, adapter, ids)
    logprob = scores.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    loss = -(row_weights.double() * logprob).sum()
    loss.backward()
    out = {"logits": scores.detach(), "token_logprob": logprob.detach(), "loss": loss.detach()}
    out |= {f"grad.{name}": value.grad for name, value in adapter.items()}
    return {name: value.float().contiguous() for name, value in out.items()}


def dequantized(c, weights, bits, block, golden):
    """The weights as the package holds them; quantized matrices also go to `golden`."""
    result = dict(weights)
    if bits == 32:
        return {name: value.float() for name, value in result.items()}
    whole = {}
    for name, matrix in fused(c, weights).items():
        codes, scales, whole[name] = quantize(matrix, bits, block)
        golden[f"{name}.q"], golden[f"{name}.s"] = torch.from_numpy(codes), torch.from_numpy(scales)
    result["model.embed_tokens.weight"] = whole["embed"]
    if "head" in whole:
        result["lm_head.weight"] = whole["head"]
    for i in range(c["num_hidden_layers"]):
        for name, targets in (("qkv", "q k v"), ("o", "o"), ("gate_up", "gate up"), ("down", "down")):
            start = 0
            for target in targets.split():
                rows = shapes(c)[target][0]
                result[f"model.layers.{i}.{NAMES[target]}.weight"] = whole[f"layers.{i}.{name}"][start : start + rows]
                start += rows
    return {name: value.float() for name, value in result.items()}


def save_checkpoint(directory, c, weights, shards):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    (directory / "tokenizer.json").write_text(tokenizer() + "\n")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    if shards == 1:
        return save_file(weights, directory / "model.safetensors", {"format": "pt"})
    names, places = list(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def compare_with_transformers(c, weights, ids, scores):
    import transformers

    config = transformers.LlamaConfig(**c, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).double()
    state = {name: value.double() for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        theirs = model(ids).logits
    error = ((theirs - scores).norm() / scores.norm()).item()
    print(f"  transformers {transformers.__version__}: relative difference {error:.1e}")
    assert error < 1e-5


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="*", help="those to make; all without")
    parser.add_argument("--transformers", action="store_true")
    arguments = parser.parse_args()
    for seed, (variant, c) in enumerate(VARIANTS.items()):
        if arguments.variants and variant not in arguments.variants:
            continue
        generator = torch.Generator().manual_seed(seed)
        weights = random_weights(c, generator, DTYPES[variant])
        save_checkpoint(HERE / variant, c, weights, 2 if variant == "untied" else 1)
        adapter = {}
        for i in range(c["num_hidden_layers"]):
            for target, (rows, columns) in shapes(c).items():
                adapter[f"layers.{i}.{target}.a"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
                adapter[f"layers.{i}.{target}.b"] = 0.2 * torch.randn(rows, RANK, generator=generator)
        ids = torch.randint(0, c["vocab_size"], (BATCH, TIME), generator=generator)
        targets = torch.randint(0, c["vocab_size"], (BATCH, TIME), generator=generator)
        row_weights = torch.randn(BATCH, TIME, generator=generator)
        row_weights[1, 6:] = 0
        row_weights[2, :2] = 0
        inputs = {"input_ids": ids, "targets": targets, "weights": row_weights, "lora_scale": torch.tensor(SCALE)}
        save_file(inputs | adapter, HERE / f"{variant}.inputs.safetensors")
        if arguments.transformers:
            none = {name: torch.zeros_like(value).double() for name, value in adapter.items()}
            plain = {name: value.double() for name, value in weights.items()}
            compare_with_transformers(c, weights, ids, logits(c, plain, none, ids))
        for bits, block in WIDTHS[variant]:
            golden = {}
            held = dequantized(c, weights, bits, block, golden)
            golden |= reference(c, held, adapter, ids, targets, row_weights)
            name = f"{variant}.{bits}" if block == BLOCK else f"{variant}.{bits}.{block}"
            save_file(golden, HERE / f"{name}.safetensors")
            print(name, "loss", golden["loss"].item())


if __name__ == "__main__":
    main()
