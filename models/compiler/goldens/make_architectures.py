"""Writes the golden checkpoints and values of every architecture but plain Llama, and of Llama 3's stretched rotary
wavelengths, for tests/architectures.rs.

The reference is Hugging Face's own implementation: run with Python 3, torch, safetensors and transformers (4.53.3 made
the committed files, 4.51.3 `llama3-rope`): `python make_architectures.py [VARIANT …]`. Each checkpoint is random and tiny,
in the form that the real ones have; the adapter is merged into the weights, in 64-bit floats, and its gradients come from
autograd.
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file
from torch.func import functional_call

HERE = pathlib.Path(__file__).parent / "architectures"
RANK, SCALE = 4, 1.5
BATCH, TIME = 2, 20
BASE = {
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 5,
}
# The keys in which each family's published configurations differ. Windows are short enough to matter.
VARIANTS = {
    "llama-bias": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "head_dim": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    # Llama 3's stretched wavelengths: so short a context that wavelengths of each kind are among them.
    "llama3-rope": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "head_dim": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": 512,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 16, "sliding_window": 7,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "sliding_window": 32768,
        "max_window_layers": 2, "use_sliding_window": False,
    },
    "qwen2-window": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False, "sliding_window": 5,
        "max_window_layers": 1, "use_sliding_window": True,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32, "attention_bias": False,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "sliding_window": None,
        "max_window_layers": 2, "use_sliding_window": False,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0,
        "tie_word_embeddings": True, "no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4, "use_sliding_window": False,
        "mlp_bias": False,
    },
    # Caps are low enough to bend the scores and logits of so small a model; the published ones are 50 and 30.
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 4, "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 7,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 4, "head_dim": 32,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
        "query_pre_attn_scalar": 24, "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 5,
        "sliding_window_pattern": 3, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
}  # fmt: skip
# Each has its own, so that one can be added and the others stay as they are.
SEEDS = {
    "llama-bias": 100, "mistral": 101, "qwen2": 102, "qwen2-window": 103, "qwen3": 104, "smollm3": 105, "gemma2": 106,
    "gemma3": 107, "llama3-rope": 108,
}  # fmt: skip
NAMES = {t: f"self_attn.{t}_proj" for t in "qkvo"} | {t: f"mlp.{t}_proj" for t in ("gate", "up", "down")}


def randomize(model, generator):
    """Matrices that keep the size of activations, norms around one, biases around zero; in bfloat16 as published."""
    for name, value in model.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        if value.dim() == 2:
            drawn = drawn * ((2.0 if "embed" in name or "lm_head" in name else 1.0) / value.shape[1] ** 0.5)
        elif name.endswith("bias"):
            drawn = 0.5 * drawn
        elif "Gemma" in type(model).__name__:
            # These norms multiply by one plus their weight.
            drawn = 0.2 * drawn
        else:
            drawn = 1 + 0.2 * drawn
        value.data = drawn.to(torch.bfloat16).to(value.dtype)


def built(c):
    """The model as it is made for its own floats, which round the scale of Gemma's embedding, then in 64 bits."""
    config = transformers.AutoConfig.for_model(**c)
    config._attn_implementation = "eager"
    torch.set_default_dtype(getattr(torch, c.get("torch_dtype", "float32")))
    model = getattr(transformers, c["architectures"][0])(config)
    torch.set_default_dtype(torch.float32)
    return model.double().eval()


def main():
    for variant, keys in VARIANTS.items():
        if sys.argv[1:] and variant not in sys.argv[1:]:
            continue
        generator = torch.Generator().manual_seed(SEEDS[variant])
        c = BASE | keys
        model = built(c)
        randomize(model, generator)
        weights = dict(model.named_parameters())
        adapter = {}
        for i in range(c["num_hidden_layers"]):
            for target, part in NAMES.items():
                rows, columns = weights[f"model.layers.{i}.{part}.weight"].shape
                adapter[f"layers.{i}.{target}.a"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
                adapter[f"layers.{i}.{target}.b"] = 0.2 * torch.randn(rows, RANK, generator=generator)
        ids = torch.randint(0, c["vocab_size"], (BATCH, TIME), generator=generator)
        targets = torch.randint(0, c["vocab_size"], (BATCH, TIME), generator=generator)
        row_weights = torch.randn(BATCH, TIME, generator=generator)
        row_weights[1, 12:] = 0

        held = {name: value.double().requires_grad_() for name, value in adapter.items()}
        merged = {name: value.detach() for name, value in weights.items()}
        for i in range(c["num_hidden_layers"]):
            for target, part in NAMES.items():
                name = f"model.layers.{i}.{part}.weight"
                merged[name] = merged[name] + SCALE * held[f"layers.{i}.{target}.b"] @ held[f"layers.{i}.{target}.a"]
        scores = functional_call(model, merged, (ids,), tie_weights=True).logits
        logprob = scores.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        loss = -(row_weights.double() * logprob).sum()
        loss.backward()

        out = {"input_ids": ids, "targets": targets, "weights": row_weights, "lora_scale": torch.tensor(SCALE)} | adapter
        floats = {"logits": scores, "token_logprob": logprob, "loss": loss} | {f"grad.{n}": v.grad for n, v in held.items()}
        out |= {name: value.detach().float().contiguous() for name, value in floats.items()}
        directory = HERE / variant
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(c, indent=1) + "\n")
        save_file({n: v.detach().to(torch.bfloat16) for n, v in weights.items()}, directory / "model.safetensors", {"format": "pt"})
        save_file(out, directory / "golden.safetensors")
        print(variant, "loss", loss.item())


if __name__ == "__main__":
    main()
