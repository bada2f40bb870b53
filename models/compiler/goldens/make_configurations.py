"""Writes configurations.json: how `transformers` itself reads configurations that leave something out, for
tests/architectures.rs.

Run with Python 3 and transformers alone (5.24.0 made the committed file, and 4.53.3 the same):
`python make_configurations.py`.
"""

import json
import pathlib

import transformers

HERE = pathlib.Path(__file__).parent
BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 30,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 4,
    "pad_token_id": 5,
}
QWEN = [
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
    {"use_sliding_window": True, "layer_types": ["sliding_attention"] + 29 * ["full_attention"]},
    {"sliding_window": 7},
]
CASES = {
    "Mistral": [{}, {"sliding_window": None}, {"sliding_window": 7}],
    "Qwen2": QWEN,
    "Qwen3": QWEN,
    "SmolLM3": [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layers": [0] + 29 * [1]},
        {"use_sliding_window": True, "sliding_window": 7, "no_rope_layer_interval": 7},
        {"no_rope_layers": [1, 0] + 40 * [1]},
    ],
    "Gemma2": [{"sliding_window": 7}],
    "Gemma3": [{"sliding_window": 7}, {"sliding_window": 7, "sliding_window_pattern": 2}],
}


def read(family, keys):
    name = "Gemma3Text" if family == "Gemma3" else family
    config = getattr(transformers, f"{name}Config")(**BASE | keys)
    layers = range(config.num_hidden_layers)
    # Mistral's layers have no kinds.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" for _ in layers]
    windowed = [layer for layer in layers if kinds[layer] == "sliding_attention"]
    has_window = config.sliding_window is not None and windowed
    return {
        "config": {"architectures": [f"{family}ForCausalLM"]} | BASE | keys,
        "window": {"tokens": config.sliding_window, "layers": windowed} if has_window else None,
        "unrotated": [layer for layer in layers if family == "SmolLM3" and not config.no_rope_layers[layer]],
    }


def main():
    cases = [read(family, keys) for family, list_of_keys in CASES.items() for keys in list_of_keys]
    (HERE / "configurations.json").write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")


if __name__ == "__main__":
    main()
