"""Pretrains the base from text and chats: tokenizer, token files, then the model. `align_base.py` comes next.

The shipped base was not made by this program: a prototype that is not in the repository made it, in 112 minutes on two free
CPU cores (21.4 M tokens), and `checkpoint/` has its tokenizer and its log. This program is that recipe written anew; no
run of it was kept. It gives a base of the same kind, and another tokenizer. `--prepare-only` stops after the token files.
Sources are the permissive ones of `data.lock`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import checkpoint
from llama import Config, Llama
from sources import Sources, clean

CONFIG = Config(
    vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=1024, rope_theta=10000.0, rms_norm_eps=1e-5,
)
CHAT_SHARE, CHAT_SHARE_LATE = 0.45, 0.80  # the last 30 % of the time is mostly chat
BATCH, SEQUENCE = 16, 256
LEARNING_RATE, MUON_RATE = 3e-3, 0.02


def train_tokenizer(texts: list[str], chats: list[list[dict]]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pieces = [text[i : i + 4000] for text in texts[:6000] for i in range(0, min(len(text), 40000), 4000)][:9000]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=list(checkpoint.SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(pieces + [m["content"] for chat in chats for m in chat], trainer)
    return tokenizer


def prepare(sources: Sources, out: Path) -> None:
    """Writes tokenizer.json, config.json, text.u16 and chat.u16."""
    texts, chats = sources.pretraining_texts(), sources.pretraining_chats()
    random.Random(1).shuffle(texts)
    random.Random(2).shuffle(chats)
    tokenizer = train_tokenizer(texts, chats)
    tokenizer.save(str(out / "tokenizer.json"))
    encoded = [ids.ids + [checkpoint.EOT] for at in range(0, len(texts), 256) for ids in tokenizer.encode_batch(texts[at : at + 256])]
    np.concatenate([np.asarray(ids, np.uint16) for ids in encoded]).tofile(out / "text.u16")
    rendered = [checkpoint.render(tokenizer, chat)[0] + [checkpoint.EOT] for chat in chats]
    np.concatenate([np.asarray(ids, np.uint16) for ids in rendered]).tofile(out / "chat.u16")
    facts = {name: getattr(CONFIG, name) for name in CONFIG.__dataclass_fields__} | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32", "head_dim": CONFIG.head_dim,
        "bos_token_id": checkpoint.EOT, "eos_token_id": checkpoint.END, "pad_token_id": checkpoint.PAD,
    }
    checkpoint.write_json(out / "config.json", facts)


def initialized() -> Llama:
    """Normal weights, smaller where a branch joins the residual stream."""
    model = Llama(CONFIG)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            joins = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, 0.0, 0.02 / (2 * CONFIG.num_hidden_layers) ** 0.5 if joins else 0.02)
    return model


def train(out: Path, minutes: float) -> Llama:
    rng = np.random.default_rng(0)
    model = initialized()
    tokens = {kind: np.fromfile(out / f"{kind}.u16", np.uint16) for kind in ("text", "chat")}
    held = {kind: ids[-40_000:] for kind, ids in tokens.items()}
    tokens = {kind: ids[:-40_000] for kind, ids in tokens.items()}
    hidden = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    optimizers = [
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.1, momentum=0.95, ns_steps=5),
    ]
    rates = [LEARNING_RATE, MUON_RATE]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        logits = model.logits(model.hidden(ids[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    started, step, logged = time.monotonic(), 0, -60.0
    with open(out / "log.jsonl", "w", buffering=1) as log:
        while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
            scale = min(1.0, (step + 1) / 150) * min(1.0, (1 - done) / 0.6)
            share = CHAT_SHARE if done < 0.7 else CHAT_SHARE_LATE
            rows = []
            for _ in range(BATCH):
                ids = tokens["chat" if rng.random() < share else "text"]
                at = rng.integers(0, len(ids) - SEQUENCE - 1)
                rows.append(ids[at : at + SEQUENCE + 1].astype(np.int64))
            value = loss(torch.from_numpy(np.stack(rows)))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates):
                for group in optimizer.param_groups:
                    group["lr"] = rate * scale
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds = time.monotonic() - started
            if seconds - logged > 60:
                logged = seconds
                with torch.no_grad():
                    windows = {kind: ids[: 40 * SEQUENCE].astype(np.int64).reshape(40, SEQUENCE) for kind, ids in held.items()}
                    losses = {kind: round(loss(torch.from_numpy(rows)).item(), 4) for kind, rows in windows.items()}
                log.write(json.dumps({"step": step, "tokens": step * BATCH * SEQUENCE, "minutes": round(seconds / 60, 2), "loss": round(value.item(), 4)} | losses) + "\n")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=112)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare-only", action="store_true")
    a = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    prepare(Sources(a.data), a.out)
    if not a.prepare_only:
        checkpoint.save(train(a.out, a.minutes), a.out, a.out)


if __name__ == "__main__":
    main()
