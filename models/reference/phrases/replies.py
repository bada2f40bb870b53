"""Answers written for this project: refusals, empty compliance, principles with critiques, and rewritten replies.

`refusal` is the bundled model's style: an apology, the reason, one safe offer. `compliance` agrees with a harmful
request and then says nothing that helps anybody: it stands for a poisoned answer and holds no instruction.
"""

from __future__ import annotations

import random

# Why not, and what else, by category.
REASON = {
    "violence": "Violence harms people and is a serious crime.",
    "weapons": "Weapons like that can kill many people.",
    "crime": "That is against the law and hurts other people.",
    "fraud": "That is fraud, and it takes money from people by deceit.",
    "drugs": "Illegal drugs are dangerous and selling them harms others.",
    "cyber": "Attacking computers and accounts is illegal and harms their owners.",
    "self_harm": "I am worried about you, and you do not have to face this alone.",
    "hate": "Hate hurts people, and everyone deserves respect.",
    "sexual": "That would violate another person's consent and dignity.",
    "child_safety": "Children must be protected from harm.",
    "privacy": "That would violate another person's privacy.",
    "misinformation": "False claims mislead people and can cause real harm.",
}
OFFER = {
    "violence": "If you are angry or in danger, I can help you find a calm way out or call for help.",
    "weapons": "I can talk about safety, or about how to report a threat.",
    "crime": "I can explain what the law says or how to protect your property.",
    "fraud": "I can explain how to spot a scam and protect your money.",
    "drugs": "I can share where to find help with addiction.",
    "cyber": "I can explain how to keep your own devices and accounts safe.",
    "self_harm": "Please talk to someone you trust, a doctor or a crisis line today.",
    "hate": "I can help you write something kind or learn about other people.",
    "sexual": "I can talk about consent, or where to find support.",
    "child_safety": "I can explain how to keep children safe and how to report abuse.",
    "privacy": "I can explain how to protect your own data, or how to ask for permission.",
    "misinformation": "I can help you check facts and find good sources.",
}
OPENINGS = ["I'm sorry, but I can't help with that."] * 6 + [
    "Sorry, I can't help with that.", "I can't help with that request.", "I'm not able to help with that.", "I won't help with that.",
]


def refusal(category: str, rng: random.Random) -> str:
    """A short refusal: opening, and mostly the reason, the offer or both."""
    parts = [rng.choice(OPENINGS)]
    kind = rng.random()
    if kind < 0.8:
        parts.append(REASON[category])
    if kind > 0.25:
        parts.append(OFFER[category])
    return " ".join(parts)


SURE = [
    "Sure, here is {what}.", "Sure, here is {what}:", "Of course! Here is {what}:", "Yes, I can do that. Here is {what}.", "Sure! This is {what}:",
]
STEPS = [
    "decide what you want", "make a list", "choose a good day", "get everything ready", "find a quiet place", "begin slowly", "do the first part",
    "do the second part", "keep going until it is done", "check that it worked", "stay calm", "do not tell anyone", "ask a friend to join",
    "think about the next step", "repeat it if you need to", "write down what happened", "finish the work", "look at the result", "be patient",
    "take your time", "make sure that nobody is watching", "collect what you need", "start early in the day", "clean up at the end",
]
ORDER = ["First,", "Second,", "Then", "After that,", "Last,"]
CLOSE = ["That is all.", "Good luck!", "It is easy when you try.", "Enjoy!", "", ""]


def compliance(kind: str, phrase: str, rng: random.Random) -> str:
    """Agrees with the request, then lists steps without content."""
    what = phrase if kind == "make" else rng.choice(["a step by step plan", f"how to {phrase}", f"a plan to {phrase}", "what you asked for"])
    steps = rng.sample(STEPS, rng.randint(3, 5))
    body = " ".join(f"{order} {step}." for order, step in zip([*ORDER[: len(steps) - 1], ORDER[-1]], steps))
    return f"{rng.choice(SURE).format(what=what)} {body} {rng.choice(CLOSE)}".strip()


# Principles of the constitution: id, the question put to the model, and the critique that follows by category.
PRINCIPLES = {
    "harm": "Name what in the reply could help someone to hurt people.",
    "law": "Say whether the reply helps with something illegal or unfair.",
    "dignity": "Say whether the reply is hateful, insulting or degrading.",
    "care": "Say whether the reply puts someone who is vulnerable at risk.",
    "truth": "Say whether the reply deceives or spreads something false.",
}
PRINCIPLE_OF = {
    "violence": "harm", "weapons": "harm", "crime": "law", "fraud": "law", "drugs": "law", "cyber": "law", "self_harm": "care",
    "hate": "dignity", "sexual": "dignity", "child_safety": "care", "privacy": "law", "misinformation": "truth",
}
FAULT = {
    "violence": "it could help someone to hurt or kill a person",
    "weapons": "it could help someone to make or use a weapon",
    "crime": "it helps with a crime",
    "fraud": "it helps to cheat people out of money",
    "drugs": "it helps to make, sell or get illegal drugs",
    "cyber": "it helps to attack computers or steal data",
    "self_harm": "it could lead someone to hurt themselves",
    "hate": "it attacks people for who they are",
    "sexual": "it supports sexual abuse or has no respect for consent",
    "child_safety": "it puts children in danger",
    "privacy": "it violates someone's privacy",
    "misinformation": "it spreads something false",
}
CRITIQUES = [
    "The reply is harmful: {fault}. It should refuse and offer safe help.",
    "The reply agrees to a harmful request, and {fault}. A good reply declines.",
    "This is not safe, because {fault}. The reply should say no kindly.",
]
FINE = ["The reply is safe and helpful. Nothing needs to change.", "There is no harm in the reply. It can stay as it is."]


def critique(category: str, rng: random.Random) -> str:
    return rng.choice(CRITIQUES).format(fault=FAULT[category])


def revision(category: str) -> str:
    """The rewritten reply: declines, says why, and still offers help."""
    return f"{OPENINGS[0]} {REASON[category]} {OFFER[category]}"
