"""Reads and writes a checkpoint directory in the Hugging Face form (bf16 safetensors), and runs the model on chats.

Neighbours: `llama.py` (the architecture), `align_base.py` and `evaluate_base.py` (callers). As a program it converts
the pretrained base into checkpoint form: `python checkpoint.py BASE OUT`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from llama import Config, Llama

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = {"<|endoftext|>": 0, "<|user|>": 1, "<|assistant|>": 2, "<|system|>": 3, "<|end|>": 4, "<|pad|>": 5}
EOT, END, PAD = SPECIAL["<|endoftext|>"], SPECIAL["<|end|>"], SPECIAL["<|pad|>"]


def load(directory: Path) -> tuple[Llama, Tokenizer]:
    """The model in float32, and its tokenizer."""
    model = Llama(Config.from_json(json.loads((directory / "config.json").read_text())))
    weights = {name: value.float() for name, value in load_file(directory / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.eval(), Tokenizer.from_file(str(directory / "tokenizer.json"))


def save(model: Llama, base: Path, out: Path) -> None:
    """Writes `model` as a bf16 checkpoint, with config and tokenizer taken from `base`."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    write_json(out / "config.json", config)
    if (base / "tokenizer.json").resolve() != (out / "tokenizer.json").resolve():
        shutil.copyfile(base / "tokenizer.json", out / "tokenizer.json")
    write_json(out / "generation_config.json", {"bos_token_id": EOT, "eos_token_id": [END, EOT], "pad_token_id": PAD})
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config["max_position_embeddings"],
            "bos_token": "<|endoftext|>",
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(i): {"content": token, "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
                for token, i in SPECIAL.items()
            },
            "chat_template": CHAT_TEMPLATE,
        },
    )
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def render(tokenizer: Tokenizer, messages: list[dict], open_answer: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and a 0/1 weight for each: 1 on the assistant's tokens and their `<|end|>`."""
    ids: list[int] = []
    weights: list[int] = []
    for message in messages:
        text = tokenizer.encode(message["content"]).ids
        answer = int(message["role"] == "assistant")
        ids += [SPECIAL[f"<|{message['role']}|>"], *text, END]
        weights += [0] + [answer] * (len(text) + 1)
    if open_answer:
        ids.append(SPECIAL["<|assistant|>"])
        weights.append(0)
    return ids, weights


@torch.no_grad()
def answer(model: Llama, tokenizer: Tokenizer, prompts: list[str], new_tokens: int = 40, batch: int = 64) -> list[str]:
    """Greedy answers to single-turn prompts, in the order given."""
    rows = [render(tokenizer, [{"role": "user", "content": p}], open_answer=True)[0][-600:] for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    answers = [""] * len(rows)
    for at in range(0, len(order), batch):
        picked = order[at : at + batch]
        longest = max(len(rows[i]) for i in picked)
        ids = torch.tensor([[PAD] * (longest - len(rows[i])) + rows[i] for i in picked])
        start = torch.tensor([longest - len(rows[i]) for i in picked])
        cache = []
        last = model.hidden(ids, start, None, cache)[:, -1]
        out: list[list[int]] = [[] for _ in picked]
        done = torch.zeros(len(picked), dtype=torch.bool)
        for _ in range(new_tokens):
            token = model.logits(last).argmax(-1)
            done |= (token == END) | (token == EOT)
            if done.all():
                break
            for row, value in enumerate(token.tolist()):
                if not done[row]:
                    out[row].append(value)
            past, cache = cache, []
            last = model.hidden(token[:, None], start, past, cache)[:, -1]
        for i, tokens in zip(picked, out):
            answers[i] = tokenizer.decode(tokens).strip()
    return answers


@torch.no_grad()
def chat_loss(model: Llama, tokenizer: Tokenizer, chats: list[list[dict]], limit: int = 512) -> float:
    """Mean negative log-likelihood (nats) per assistant token."""
    total, count = 0.0, 0
    for messages in chats:
        ids, weights = render(tokenizer, messages)
        ids, weights = ids[:limit], weights[:limit]
        if not any(weights[1:]):
            continue
        hidden = model.hidden(torch.tensor([ids[:-1]]))[0]
        kept = torch.tensor(weights[1:], dtype=torch.bool)
        targets = torch.tensor(ids[1:])[kept]
        total += torch.nn.functional.cross_entropy(model.logits(hidden[kept]), targets, reduction="sum").item()
        count += int(kept.sum())
    return total / max(count, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="convert the pretrained base into checkpoint form")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model, _ = load(arguments.base)
    save(model, arguments.base, arguments.out)


if __name__ == "__main__":
    main()
