"""Reads the source folders that training may use, and refuses the ones kept for evaluation.

`align_base.py` and `make_adapter_data.py` train from here; `evaluate_base.py` reads `held_out_prompts`. Every file that
is opened is remembered, so that `data.lock` can list it with its hash: `python sources.py --data DIR --lock data.lock`.
"""

from __future__ import annotations

import argparse
import ast
import csv
import gzip
import hashlib
import io
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

from judge import refuses
from phrases import bucket

# Published figures mean something only because nothing here is ever trained on.
EVALUATION_ONLY = (
    "safety-advbench", "safety-harmbench", "safety-hatecheck", "safety-do-not-answer", "eval-mt-bench", "eval-vicuna-bench",
    "eval-wikitext2-ccbysa",
)
LOCK_HEAD = """\
# file under the data directory, uses, sha256
# pretrain, train: base, guard, reviser. eval: their figures. paper: clients, operator and preferences of scripts/reproduce-paper.
# judge: its second judge. The other uses of a file read other rows than pretrain and train do: another split, other rows by
# number (MedQuAD), other hash buckets (hh-rlhf: below 30 pretrain and train, 30-69 paper's clients and judge, 70-99 eval and
# paper's preferences). STAR is the exception: the paper's clients have rows of it that the base was pretrained on.
# The word vectors of guard.words are no file here: cluster_words.py has the package and its sha256.
"""
# What the base was pretrained on of the texts, in bytes.
OPENSTAX_BYTES, BOOKS_BYTES = 28_000_000, 5_000_000
# hh-rlhf conversations whose first message hashes below are the project's own; the others belong to clients and evaluations.
HH_OWN_BUCKETS = 30
HAZARD_CATEGORY = {
    "vcr": "violence", "ncr": "crime", "src": "sexual", "cse": "child_safety", "dfm": "misinformation", "prv": "privacy", "ipv": "crime",
    "iwp": "weapons", "hte": "hate", "ssh": "self_harm", "sxc_prn": "sexual", "spc_ele": "misinformation",
}
MODERATION_CATEGORY = {
    "S3": "child_safety", "S": "sexual", "SH": "self_harm", "V2": "violence", "V": "violence", "H2": "hate", "H": "hate", "HR": "hate",
}
# The labels of evaluation-only sets that one of our categories stands for; the others have none ("illegal", "malicious_uses").
HARMBENCH_CATEGORY = {
    "chemical_biological": "weapons", "cybercrime_intrusion": "cyber", "harassment_bullying": "hate",
    "misinformation_disinformation": "misinformation",
}
DO_NOT_ANSWER_CATEGORY = {
    "discrimination_exclusion_toxicity_hateful_offensive": "hate", "human_chatbox": None, "information_hazard": "privacy",
    "malicious_uses": None, "misinformation_harms": "misinformation",
}
DIALOGUE_CATEGORY = {"Offending User": "hate", "Toxicity Agreement": "hate", "Biased Opinion": "hate", "Risk Ignorance": "self_harm"}
OBJECTIVE = re.compile(r"^- ((?:Explain|Describe|Identify|Compare|Discuss|Define|Analy[sz]e|List|Summarize|Outline|Give|Distinguish|Calculate|Use|Write|Create|Develop|Determine|State)\b[^\n]{15,110})$", re.MULTILINE)
TEXT_QUESTION = re.compile(r"(?:(?<=\. )|(?<=\? )|(?<=\n))((?:What|How|Why|When|Where|Which|Who|Can|Do|Does|Is|Are|Should)\b[^.?!\n]{18,110}\?)")
TITLE_FRAMES = (
    "Tell me about {x}.", "What is {x}?", "Explain {x}", "Write a short text about {x}.", "I need help with {x}.", "Can you tell me about {x}?",
    "Create an outline for {x}", "Write an essay on {x}", "Give me an overview of {x}", "Teach me about {x}.", "Provide notes on {x}", "Develop a lesson on {x}",
)
# Advice questions that read as ordinary ones: refusing them would be refusing too much.
ADVICE_POLICIES = {"Legal Opinion", "Financial Advice", "Health Consultation", "Political Lobbying", "Gov Decision"}
KEYWORDS = (
    ("child_safety", r"child|minor|underage|pedo|kids?\b|teenager|school ?(boy|girl)"),
    ("self_harm", r"suicid|kill (myself|themsel)|self[- ]?harm|cut(ting)? myself|anorexi|eating disorder|overdose"),
    ("sexual", r"sex(?!is)|porn|rape|nude|prostitut|adult content|erotic"),
    ("drugs", r"\bdrugs?\b|cocaine|heroin|meth\b|methamph|opioid|marijuana|weed\b|cannabis|steroid"),
    ("weapons", r"bomb|weapon|\bguns?\b|explosive|terror|firearm|nuclear|poison|anthrax|ammunition|chemical agent|virus(?!es on)"),
    ("cyber", r"hack|malware|ransom|phish|password|comput|cyber|software|network|ddos|spyware|data ?base|botnet|server|encrypt|wifi"),
    ("fraud", r"fraud|scam|launder|counterfeit|forg|tax|embezzl|ponzi|pyramid|insider|credit card|investor|fake (id|documents|invoice)|money"),
    ("privacy", r"privacy|stalk|track|spy|surveil|personal (data|information)|address|dox|identit"),
    ("hate", r"hate|racis|discriminat|stereotyp|minorit|racial|ethnic|religio|women|gender|immigrant|homophob|superior|prejudice|oppress"),
    ("misinformation", r"misinform|disinform|fake|propaganda|conspirac|false|mislead|manipulat|rumou?r|hoax|defam|decei|opinion"),
    ("violence", r"kill|murder|attack|violen|assault|hurt|harm|abus|tortur|kidnap|fight|beat|shoot|stab|animal"),
)


# hh-rlhf's harmless half also holds harmless requests: keep those that sound harmful and whose reply objects.
UNKIND = re.compile("|".join(pattern for _, pattern in KEYWORDS) + r"|steal|stole|illegal|insult|idiot|revenge|prank|stupid|hate|drunk|fire ", re.IGNORECASE)
OBJECTION = re.compile(
    r"illegal|sorry|\bharm|not a good|shouldn't|should not|wrong|dangerous|don't (?:want|think|know that)|not (?:ok|okay|right|sure)|why (?:do|would) you"
    r"|hurt|respect|unethical|against the law|crime|better to|instead|trouble|concern",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """One request: `answer` where the source has a usable one, `category` where it is harmful."""

    text: str
    source: str
    category: str | None = None
    answer: str | None = None


def clean(text: str) -> str:
    """Plain quotes, dashes and spaces, exactly as the base was pretrained (so that hashes of messages agree)."""
    text = text.replace("\r", "").replace("\u2019", "'").replace("\u2018", "'").replace("\u201c", '"').replace("\u201d", '"')
    text = text.replace("\u2014", " - ").replace("\u2013", "-")
    return re.sub(r"[ \t]+", " ", re.sub(r"\n{3,}", "\n\n", text)).strip()


def guess_category(text: str) -> str:
    """A category by keyword for sources that do not label theirs; `crime` when nothing matches."""
    lower = text.lower()
    return next((category for category, pattern in KEYWORDS if re.search(pattern, lower)), "crime")


class Sources:
    """The shared data folder, for training."""

    def __init__(self, data: Path, evaluation: bool = False):
        self.data = data
        self.evaluation = evaluation
        self.opened: dict[str, str] = {}

    def text(self, name: str) -> str:
        if not self.evaluation and name.split("/")[0] in EVALUATION_ONLY:
            raise PermissionError(f"{name} is kept for evaluation, training may not read it")
        raw = (self.data / name).read_bytes()
        self.opened[name] = hashlib.sha256(raw).hexdigest()
        return (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8", "replace")

    def lines(self, name: str) -> Iterator[dict]:
        return (json.loads(line) for line in self.text(name).split("\n") if line.strip())

    def table(self, name: str) -> Iterator[dict]:
        csv.field_size_limit(1 << 24)
        return csv.DictReader(io.StringIO(self.text(name)))

    def hh(self, file: str) -> Iterator[list[dict]]:
        """Conversations of the project's own share, as messages."""
        for row in self.lines(f"hh-rlhf/{file}.test.jsonl.gz"):
            messages = hh_messages(row["chosen"])
            if len(messages) >= 2 and bucket(messages[0]["content"]) < HH_OWN_BUCKETS:
                yield messages

    # What the base was pretrained on

    def pretraining_texts(self) -> list[str]:
        texts: list[str] = []
        size = 0
        for part in ("00", "01"):
            for row in self.lines(f"text-openstax-ccby/openstax-{part}.jsonl.gz"):
                text = clean(row["text"])
                if size < OPENSTAX_BYTES and len(text) > 400:
                    texts.append(text)
                    size += len(text)
        size = 0
        for row in self.lines("text-public-domain-books/books-00.jsonl.gz"):
            if size < BOOKS_BYTES and not 0 < (row.get("year") or 0) < 1850:
                texts.append(clean(re.sub(r"(?<!\n)\n(?!\n)", " ", row["text"])))
                size += len(texts[-1])
        stories = [clean(row["text"]) for row in self.lines("text-storybooks-ccby/storybooks_en.jsonl.gz")]
        return texts + stories * 3 + [clean(row["text"]) for row in self.lines("text-18f-cc0/18f.jsonl.gz")]

    def pretraining_chats(self) -> list[list[dict]]:
        chats = self.chats() + list(self.hh("helpful-rejection-sampled"))
        pairs = []
        for i, row in enumerate(self.lines("instruct-medquad-ccby/medquad.jsonl.gz")):
            if i % 4 == 0 and row.get("answer"):
                pairs.append((row["question"], clean(row["answer"])[:800]))
        for row in json.loads(self.text("instruct-llms-from-scratch/instruction-data.json")):
            pairs += [(row["instruction"] + ("\n" + row["input"] if row["input"] else ""), row["output"])] * 2
        for row in self.lines("instruct-gsm8k/train.jsonl.gz"):
            pairs.append((row["question"], re.sub(r"<<.*?>>", "", row["answer"])))
        return chats + [[{"role": "user", "content": clean(q)}, {"role": "assistant", "content": clean(r)}] for q, r in pairs]

    # Harmful requests

    def harmful(self) -> list[Prompt]:
        rows = []
        for row in self.table("safety-ailuminate-demo/airr_official_1.0_demo_en_us_prompt_set_release.csv"):
            if category := HAZARD_CATEGORY.get(row["hazard"]):
                rows.append(Prompt(clean(row["prompt_text"]), "ailuminate", category))
        for name in ("harmfulqa", "catqa_english"):
            for topics in json.loads(self.text(f"safety-harmfulqa/{name}.json")).values():
                for questions in topics.values():
                    rows += [Prompt(clean(q), name.split("_")[0], guess_category(q)) for q in questions]
        for row in self.table("safety-jailbreak-llms/questions.csv"):
            if row["content_policy_name"] not in ADVICE_POLICIES:
                text = clean(row["question"])
                rows.append(Prompt(text, "jailbreak-questions", guess_category(row["content_policy_name"] + " " + text)))
        for messages in self.hh("harmless-base"):
            text, reply = messages[0]["content"], messages[1]["content"]
            if refuses(reply) or (UNKIND.search(text) and OBJECTION.search(reply)):
                rows.append(Prompt(text, "hh-harmless", guess_category(text)))
        return [row for row in rows if 8 <= len(row.text) <= 900]

    # Benign requests

    def benign(self, split: str = "train") -> list[Prompt]:
        """Requests that deserve an answer; `split` is "train" or "test" (never overlapping)."""
        rows = []
        for text, intent in json.loads(self.text("benign-clinc150/data_full.json.gz"))[split]:
            rows.append(Prompt(clean(text), f"clinc150/{intent}"))
        for row in self.table(f"benign-banking77/{split}.csv.gz"):
            rows.append(Prompt(clean(row["text"]), f"banking77/{row['category']}"))
        for i, row in enumerate(self.lines("instruct-medquad-ccby/medquad.jsonl.gz")):
            if row.get("answer") and i % 16 == (0 if split == "train" else 5):
                rows.append(Prompt(clean(row["question"]), "medquad", answer=first_sentences(clean(row["answer"]), 300)))
        for i, row in enumerate(json.loads(self.text("instruct-llms-from-scratch/instruction-data.json"))):
            if split == "train":  # the base was pretrained on all of it
                question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
                rows.append(Prompt(clean(question), "llms-from-scratch", answer=clean(row["output"])))
        for row in self.lines(f"instruct-gsm8k/{split}.jsonl.gz"):
            rows.append(Prompt(clean(row["question"]), "gsm8k", answer=clean(re.sub(r"<<.*?>>", "", row["answer"]))))
        if split == "train":
            for file in ("helpful-base", "helpful-online", "helpful-rejection-sampled"):
                for messages in self.hh(file):
                    if not refuses(messages[1]["content"]):
                        rows.append(Prompt(messages[0]["content"], "hh-helpful", answer=first_sentences(messages[1]["content"], 300)))
            rows += self.textbook() + self.instructions() + self.follow_ups()
        return [row for row in rows if 4 <= len(row.text) <= 900 and row.answer != ""]

    def textbook(self) -> list[Prompt]:
        """What textbooks ask of a reader: learning objectives ("Describe the …"), questions and titles, with a sentence
        of the same module that shares most words as the answer."""
        rows = []
        for part in ("00", "01"):
            for module in self.lines(f"text-openstax-ccby/openstax-{part}.jsonl.gz"):
                text = clean(module["text"])
                sentences = [s for s in re.split(r"(?<=[.?!])\s+", text) if 50 <= len(s) <= 220 and s[0].isupper() and s[-1] == "." and "\n" not in s][:80]
                asked = OBJECTIVE.findall(text)[:3] + [q for q in TEXT_QUESTION.findall(text)][:3]
                if 8 <= len(module["title"]) <= 60 and not module["title"].startswith(("Introduction", "Preface")):
                    asked.append(TITLE_FRAMES[bucket(module["title"], len(TITLE_FRAMES))].format(x=module["title"]))
                for question in asked:
                    if sentences:
                        words = set(re.findall(r"\w{4,}", question.lower()))
                        best = max(sentences, key=lambda s: len(words & set(re.findall(r"\w{4,}", s.lower()))) / len(s) ** 0.5)
                        rows.append(Prompt(question.strip(), "openstax", answer=best))
        return rows

    def instructions(self) -> list[Prompt]:
        """Tasks written by people (self-instruct) and the best first answers of Open Assistant's sample."""
        rows = []
        for name in ("seed_tasks", "user_oriented_instructions"):
            for row in self.lines(f"instruct-self-instruct/{name}.jsonl"):
                one = row["instances"][0]
                text = clean(row["instruction"] + ("\n" + one["input"] if one["input"] else ""))
                rows.append(Prompt(text, "instructions", answer=first_sentences(clean(one["output"]), 300)))
        for tree in self.lines("chat-oasst-sample/en_100_tree.jsonl.gz"):
            root = tree["prompt"]
            replies = [r["text"] for r in root["replies"] if not r.get("deleted") and not refuses(r["text"])]
            if replies and not root.get("deleted"):
                rows.append(Prompt(clean(root["text"]), "instructions", answer=first_sentences(clean(replies[0]), 300)))
        return rows

    def follow_ups(self) -> list[Prompt]:
        """Later questions of hh-rlhf's helpful conversations, where they stand alone."""
        rows = []
        for file in ("helpful-base", "helpful-online", "helpful-rejection-sampled"):
            for messages in self.hh(file):
                for said, reply in zip(messages[2::2], messages[3::2]):
                    if 25 <= len(said["content"]) <= 200 and not refuses(reply["content"]):
                        rows.append(Prompt(said["content"], "hh-follow-up", answer=first_sentences(reply["content"], 300)))
        return rows

    def chats(self) -> list[list[dict]]:
        """Multi-turn conversations that keep the base's manner of talking."""
        rows = []
        for name in ("chat-synthetic-persona-ccby/synthetic_persona_chat", "chat-star-mit/star", "chat-chatterbot-bsd/chatterbot_english"):
            for row in self.lines(f"{name}.jsonl.gz"):
                if not any("[user" in m["content"] for m in row["messages"]):
                    rows.append([{"role": m["role"], "content": clean(m["content"])} for m in row["messages"]])
        for i, row in enumerate(self.lines("chat-taskmaster4-ccby/taskmaster4.jsonl.gz")):
            if i < 1200:
                rows.append([{"role": m["role"], "content": clean(m["content"])} for m in row["messages"]])
        for file in ("helpful-base", "helpful-online"):
            rows += self.hh(file)
        return [row for row in rows if len(row) >= 2]

    # Texts with a label, for the guard

    def guard_texts(self) -> Iterator[tuple[str, str | None, str, str | None, str]]:
        """(prompt, response, label, category, source) of the data sets that carry labels of their own."""
        for row in self.table("safety-surge-toxicity/toxicity_en.csv"):
            toxic = row["is_toxic"] == "Toxic"
            yield clean(row["text"]), None, "unsafe" if toxic else "safe", "hate" if toxic else None, "surge-toxicity"
        for row in self.lines("safety-openai-moderation/samples-1680.jsonl.gz"):
            category = next((MODERATION_CATEGORY[flag] for flag in MODERATION_CATEGORY if row.get(flag)), None)
            yield clean(row["prompt"]), None, "unsafe" if category else "safe", category, "openai-moderation"
        yield from self.diasafety("train")

    def diasafety(self, split: str) -> Iterator[tuple[str, str | None, str, str | None, str]]:
        for row in json.loads(self.text(f"safety-diasafety/{split}.json.gz")):
            if category := DIALOGUE_CATEGORY.get(row["category"]):
                unsafe = row["label"] == "Unsafe"
                yield clean(row["context"]), clean(row["response"]), "unsafe" if unsafe else "safe", category if unsafe else None, "diasafety"

    def held_out_guard_texts(self) -> Iterator[tuple[str, str | None, str, str | None, str]]:
        """The same, from sets that training never sees; categories are the sets' own labels or none."""
        for text, source, category in self.held_out_labelled():
            yield text, None, "unsafe", category, source
        for row in self.table("safety-advbench/harmful_behaviors_dev.csv"):
            yield clean(row["goal"]), clean(row["target"]), "unsafe", None, "advbench-pairs"
        for row in self.table("safety-hatecheck/test_suite_cases.csv"):
            hateful = row["label_gold"] == "hateful"
            yield clean(row["test_case"]), None, "unsafe" if hateful else "safe", "hate" if hateful else None, "hatecheck"
        yield from self.diasafety("test")

    # Held out

    def held_out_labelled(self) -> Iterator[tuple[str, str, str | None]]:
        """Requests of the evaluation-only sets: (text, set or set/label, the category that the label stands for)."""
        for row in self.table("safety-advbench/harmful_behaviors_dev.csv"):
            yield clean(row["goal"]), "advbench", None
        for row in self.table("safety-harmbench/harmbench_behaviors_text_all.csv"):
            if row["FunctionalCategory"] == "standard":
                label = row["SemanticCategory"]
                yield clean(row["Behavior"]), f"harmbench-standard/{label}", HARMBENCH_CATEGORY.get(label)
        for area, category in DO_NOT_ANSWER_CATEGORY.items():
            for row in self.lines(f"safety-do-not-answer/{area}.jsonl"):
                yield clean(row["prompt"]), f"do-not-answer/{area}", category

    def held_out_harmful(self) -> dict[str, list[str]]:
        """The same requests by set."""
        by_set: dict[str, list[str]] = {}
        for text, source, _ in self.held_out_labelled():
            by_set.setdefault(source.split("/")[0], []).append(text)
        return by_set

    def held_out_chats(self) -> list[list[dict]]:
        """hh-rlhf helpful conversations outside the project's share: first exchange only.

        Buckets 90 to 99 were looked at while the mixture was tuned; the published figures come from 70 to 79.
        """
        rows = []
        for row in self.lines("hh-rlhf/helpful-base.test.jsonl.gz"):
            messages = hh_messages(row["chosen"])
            if len(messages) >= 2 and bucket(messages[0]["content"]) // 10 == 7:
                rows.append(messages[:2])
        return rows


def hh_messages(text: str) -> list[dict]:
    turns = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    return [{"role": "user" if who == "Human" else "assistant", "content": clean(said)} for who, said in zip(turns[::2], turns[1::2])]


def first_sentences(text: str, length: int) -> str:
    """At most `length` characters, cut after a sentence where there is one."""
    text = re.sub(r"\s+", " ", text)
    if len(text) <= length:
        return text
    cut = max(text.rfind(end, 0, length) for end in (". ", "! ", "? "))
    return text[: cut + 1] if cut > 40 else ""


def main() -> None:
    # Here, since both read from this file.
    import make_paper_data
    import train_refusal_judge

    parser = argparse.ArgumentParser(description="list every source file that training or evaluation opens, with its uses and its sha256")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    arguments = parser.parse_args()
    by_use = {use: Sources(arguments.data, evaluation=use == "eval") for use in ("pretrain", "train", "eval", "paper", "judge")}
    pretraining, training, evaluation, paper, judge = by_use.values()
    pretraining.pretraining_texts(), pretraining.pretraining_chats()
    training.harmful(), training.benign(), training.chats(), list(training.guard_texts())
    evaluation.held_out_harmful(), evaluation.held_out_chats(), evaluation.benign("test"), list(evaluation.held_out_guard_texts())
    rng = random.Random(0)
    make_paper_data.real_benign(paper, rng), make_paper_data.real_harmful(paper, rng), make_paper_data.preferences(paper, rng)
    for file in train_refusal_judge.LABELLED:
        train_refusal_judge.hh_replies(judge, file, train_refusal_judge.TRAIN)
    opened = {name: sha for source in by_use.values() for name, sha in source.opened.items()}
    lines = [f"{name}  {','.join(use for use in by_use if name in by_use[use].opened)}  {sha}" for name, sha in sorted(opened.items())]
    arguments.lock.write_text(LOCK_HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
