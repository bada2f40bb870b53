"""Writes the golden checkpoints and values of the encoders that classify texts, for tests/encoders.rs and the runtime's
tests/classify.rs.

The reference is Hugging Face's own implementation: run with Python 3, torch, numpy, safetensors, tokenizers and
transformers (4.53.3 made the committed files): `python make_encoders.py`. Each checkpoint is random and tiny, in the form
that the real ones have. The batch is ragged, of single texts and pairs; logits are computed in 64-bit floats, for the
weights as they are and as the package quantizes them (`quantize` of make.py).
"""

import json
import pathlib

import torch
import transformers
from make import quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

HERE = pathlib.Path(__file__).parent / "encoders"
SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
TEXTS = [
    ["how do I bake bread?", None],
    ["x", None],
    ["tell me how to pick a lock", "no, I will not help with that one"],
    ["", "yes"],
]
BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 104,
    "max_position_embeddings": 80,
    "pad_token_id": 1,
    "id2label": {"0": "safe", "1": "unsafe"},
    "label2id": {"safe": 0, "unsafe": 1},
}
THREE = {"0": "toxic", "1": "insult", "2": "threat"}
DEBERTA = {
    "architectures": ["DebertaV2ForSequenceClassification"], "model_type": "deberta-v2", "hidden_act": "gelu",
    "layer_norm_eps": 1e-7, "relative_attention": True, "pooler_hidden_act": "gelu", "pooler_hidden_size": 32,
}  # fmt: skip
MODERN = {
    "architectures": ["ModernBertForSequenceClassification"], "model_type": "modernbert", "hidden_activation": "gelu",
    "num_attention_heads": 2, "num_hidden_layers": 5, "norm_eps": 1e-5, "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0, "global_attn_every_n_layers": 3, "local_attention": 8, "classifier_activation": "gelu",
}  # fmt: skip
# The keys in which each family's published configurations differ. Windows, spans and buckets are short enough to matter.
VARIANTS = {
    "bert": {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "type_vocab_size": 2, "position_embedding_type": "absolute",
    },
    "bert-labels": {
        "architectures": ["BertForSequenceClassification"], "model_type": "bert", "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-12, "type_vocab_size": 2, "problem_type": "multi_label_classification",
        "id2label": THREE, "label2id": {name: int(index) for index, name in THREE.items()},
    },
    "roberta": {
        "architectures": ["RobertaForSequenceClassification"], "model_type": "roberta", "hidden_act": "gelu",
        "layer_norm_eps": 1e-5, "type_vocab_size": 1, "position_embedding_type": "absolute",
    },
    "deberta": DEBERTA | {
        "type_vocab_size": 0, "max_relative_positions": -1, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": "p2c|c2p", "position_biased_input": False,
    },
    "deberta-own": DEBERTA | {
        "type_vocab_size": 2, "max_relative_positions": 24, "position_buckets": -1, "norm_rel_ebd": "none",
        "share_att_key": False, "pos_att_type": ["p2c", "c2p"], "position_biased_input": True,
    },
    "deberta-c2p": DEBERTA | {
        "type_vocab_size": 0, "max_relative_positions": 40, "position_buckets": 16, "norm_rel_ebd": "layer_norm",
        "share_att_key": True, "pos_att_type": ["c2p"], "position_biased_input": False,
    },
    "modernbert": MODERN | {"norm_bias": False, "attention_bias": False, "mlp_bias": False, "classifier_bias": False,
        "classifier_pooling": "cls",
    },
    "modernbert-mean": MODERN | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True,
        "classifier_pooling": "mean",
    },
}  # fmt: skip
# What the package keeps in floats.
FLOATS = ("position_embeddings", "token_type_embeddings", "rel_embeddings", "classifier.weight", "out_proj")


def tokenizer():
    """One token per character, framed as BERT frames a text and a pair."""
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate(SPECIAL + characters)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 0), ("[SEP]", 2)],
    )
    return made


def batch(made):
    """The texts as the models take them: padded on the right."""
    rows = [made.encode(text) if pair is None else made.encode(text, pair) for text, pair in TEXTS]
    longest = max(len(row.ids) for row in rows)
    padded = lambda values, fill: torch.tensor([list(row) + [fill] * (longest - len(row)) for row in values])
    return {
        "input_ids": padded([row.ids for row in rows], 1),
        "token_type_ids": padded([row.type_ids for row in rows], 0),
        "lengths": torch.tensor([len(row.ids) for row in rows]),
    }


def randomize(model, generator):
    """Matrices that keep the size of activations, norms around one, biases around zero; in bfloat16."""
    for name, value in model.named_parameters():
        drawn = torch.randn(value.shape, generator=generator)
        if value.dim() == 2:
            drawn = drawn * (1.0 if "embeddings" in name else 1.5 / value.shape[1] ** 0.5)
        elif name.endswith("bias"):
            drawn = 0.5 * drawn
        else:
            drawn = 1 + 0.2 * drawn
        value.data = drawn.to(torch.bfloat16).to(value.dtype)


def logits(model, inputs, types):
    """Each row alone and without padding: that the graph's rows do not see theirs is part of what is tested."""
    rows = []
    for row, length in enumerate(inputs["lengths"].tolist()):
        names = ["input_ids", "token_type_ids"] if types else ["input_ids"]
        with torch.no_grad():
            keys = {name: inputs[name][row : row + 1, :length] for name in names}
            rows.append(model(**keys, attention_mask=torch.ones(1, length, dtype=torch.long)).logits)
    return torch.cat(rows).float().contiguous()


def main():
    HERE.mkdir(exist_ok=True)
    made = tokenizer()
    (HERE / "tokenizer.json").write_text(made.to_str(pretty=False) + "\n")
    (HERE / "texts.json").write_text(json.dumps(TEXTS, indent=1) + "\n")
    inputs = batch(made)
    for seed, (variant, keys) in enumerate(VARIANTS.items(), 200):
        generator = torch.Generator().manual_seed(seed)
        c = BASE | keys
        config = transformers.AutoConfig.for_model(**json.loads(json.dumps(c)))
        config._attn_implementation = "eager"
        config.reference_compile = False
        model = getattr(transformers, c["architectures"][0])(config).double().eval()
        randomize(model, generator)
        directory = HERE / variant
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(c, indent=1) + "\n")
        weights = {name: value.detach().to(torch.bfloat16) for name, value in model.named_parameters()}
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        types = c.get("type_vocab_size", 0) > 1
        golden = dict(inputs) | {"logits.32": logits(model, inputs, types)}
        plain = {name: value.detach().clone() for name, value in model.named_parameters()}
        for bits in (8, 4):
            for name, value in model.named_parameters():
                if value.dim() == 2 and not any(part in name for part in FLOATS):
                    value.data = quantize(plain[name].float(), bits)[2].to(value.dtype)
            golden[f"logits.{bits}"] = logits(model, inputs, types)
        save_file(golden, directory / "golden.safetensors")
        print(variant, golden["logits.32"].tolist())
    buckets = {}
    for number, furthest in ((256, 512), (32, 128), (8, 80), (16, 40), (9, 30)):
        rows = make_log_bucket_position(torch.arange(-furthest - 20, furthest + 21), number, furthest).long() + number
        buckets[f"{number} {furthest}"] = rows.clamp(0, 2 * number - 1).tolist()
    (HERE / "buckets.json").write_text(json.dumps(buckets) + "\n")


if __name__ == "__main__":
    main()
