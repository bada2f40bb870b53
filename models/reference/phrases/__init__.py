"""Text written for this project (Apache-2.0): requests, look-alikes, refusals and household facts.

`harmful.py` holds requests only, never instructions; `benign.py` holds look-alikes and household facts;
`replies.py` holds refusals, empty compliance, critiques and revisions. `{a|b}` in a phrase stands for a choice.
"""

from __future__ import annotations

import hashlib
import itertools
import re

CHOICE = re.compile(r"\{([^{}]*)\}")


def expand(phrase: str) -> list[str]:
    """Every text that a phrase with `{a|b}` choices stands for, in order."""
    parts = CHOICE.split(phrase)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    texts = (re.sub(r"\s+", " ", "".join(pick)) for pick in itertools.product(*options))
    return [re.sub(r" ([?.,!])", r"\1", text).strip() for text in texts]


def bucket(text: str, buckets: int = 100) -> int:
    """A stable bucket of a text: splits that do not move when rows are added."""
    return int(hashlib.blake2b(text.encode(), digest_size=4).hexdigest(), 16) % buckets
