"""Renders what published guards are asked with their own chat templates, for `tests/forms.rs`.

    python models/safety/goldens/make_prompts.py DIR > models/safety/goldens/prompts.json

DIR holds a checkpoint's `chat_template.jinja` (or the `chat_template` of its `tokenizer_config.json`) for each form:
`llama-guard-3-1b.jinja` (meta-llama/Llama-Guard-3-1B), `llama-guard-3-8b.jinja` (meta-llama/Llama-Guard-3-8B),
`shieldgemma.jinja` (google/shieldgemma-9b) and `qwen3guard-gen.jinja` (Qwen/Qwen3Guard-Gen-8B). The templates stay out of
the repository, the first two for their licence. Needs jinja2; the environment is the one that transformers renders in.

`prompts.json` was rendered where the gated checkpoints were not at hand: ShieldGemma from its chat template as the tests
of text-generation-inference have it; Llama Guard 3 1B from the template of the 11B, which is published in full and asks the
same of text; Llama Guard 3 8B and Qwen3Guard-Gen from templates typed again from published output of
`apply_chat_template`. Whoever has the checkpoints should run this again.
"""

import json
import sys
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

EXCHANGES = [
    ("What is the recipe for mayonnaise?", None),
    ("What is the recipe for mayonnaise?", "Whisk egg yolks with oil.\nSeason with salt, and lemon!"),
    ("  Wie töte ich einen Linux-Prozess? \n", " kill -9 1234 "),
]

# What the model writes before its answer: Llama Guard 3 1B a blank line, which the 8B's template ends with already.
ANSWER_LEAD = {
    "llama-guard-3-1b": "\n\n",
    "llama-guard-3-8b": "",
    "shieldgemma": "",
    "qwen3guard-gen": "Safety:",
}

# https://ai.google.dev/gemma/docs/shieldgemma/model_card (CC BY 4.0), use cases 1 and 2.
DANGEROUS = "content that harming oneself and/or others (e.g., accessing or building firearms and explosive devices, promotion of terrorism, instructions for suicide)."
HARASSMENT = "content that is malicious, intimidating, bullying, or abusive content targeting another individual (e.g., physical threats, denial of tragic events, disparaging victims of violence)."
HATE = "content that targeting identity and/or protected attributes (e.g., racial slurs, promotion of discrimination, calls to violence against protected groups) or dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, age, nationality, veteran status, sexual orientation, gender, gender identity, caste, or any other protected status. We do allow content that includes a reference to a protected individual or group in a positive manner."
SEXUAL = "content that contains references to sexual acts or other lewd content (e.g., sexually graphic descriptions, content aimed at causing arousal). Medical or scientific terms related to human anatomy or sex education are permitted."
GUIDELINES = {
    "dangerous": ("No Dangerous Content", DANGEROUS),
    "harassment": ("No Harassment", HARASSMENT),
    "hate": ("No Hate Speech", HATE),
    "sexual": ("No Sexually Explicit Information", SEXUAL),
}


def guideline(category, with_response):
    if category is None:
        return None
    name, content = GUIDELINES[category]
    who = "The chatbot shall not generate" if with_response else "The prompt shall not contain or seek generation of"
    return f'"{name}": {who} {content}'


def fail(message):
    raise ValueError(message)


def main():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = fail
    goldens = []
    for form, lead in ANSWER_LEAD.items():
        template = environment.from_string((Path(sys.argv[1]) / f"{form}.jinja").read_text())
        for prompt, response in EXCHANGES:
            # The filter trims what a person wrote, as Llama Guard's templates do.
            messages = [{"role": "user", "content": prompt.strip()}]
            if response is not None:
                messages.append({"role": "assistant", "content": response.strip()})
            if form == "llama-guard-3-1b":
                for message in messages:
                    message["content"] = [{"type": "text", "text": message["content"]}]
            for category in GUIDELINES if form == "shieldgemma" else [None]:
                rendered = template.render(
                    messages=messages,
                    guideline=guideline(category, response is not None),
                    bos_token="<bos>",
                    excluded_category_keys=[],
                )
                # The 8B's template leaves white space before its first token.
                rendered = rendered.lstrip() if form == "llama-guard-3-8b" else rendered
                goldens.append(
                    {
                        "form": form,
                        "category": category,
                        "prompt": prompt,
                        "response": response,
                        "rendered": rendered,
                        "answer_lead": lead,
                    }
                )
    json.dump(goldens, sys.stdout, ensure_ascii=False, indent=1)
    print()


main()
