"""Plain questions over many everyday words: kinds of things, what people ask about them, and one answer per kind.

They give the base a wide ground of harmless words, so that an unknown one is not a reason to refuse. The answers are
general on purpose: facts are the business of other data. No evaluation set was used to choose the words. The last `EVALUATION_SHARE` percent are for evaluation.
"""

from __future__ import annotations

from phrases import bucket, expand

EVALUATION_SHARE = 10

# (things, questions with {x}, answers with {x})
KINDS: list[tuple[str, str, str]] = [
    (
        "potato salad|lasagne|pancakes|cinnamon rolls|chicken soup|fried rice|apple pie|a cheese omelette|tomato salad|fish tacos|beef stew|pizza dough|banana bread|"
        "vegetable curry|roast lamb|a fruit smoothie|tea|coffee|lemonade|noodles|meatballs|mushroom sauce|hummus|waffles|duck|sushi|cheesecake|scrambled eggs|a sandwich|beans",
        "How do I {cook|make|prepare|serve} {x}?|What do I need to make {x}?|What goes well with {x}?|Where should {x} go, shelf or fridge?|Can I freeze {x}?|Is {x} healthy?|"
        "What is a good recipe for {x}?|how many calories are in {x}|Why does my {x} taste of nothing?|Can I use something else for {x}?|I want to cook {x} tonight.",
        "For {x}, use fresh ingredients, season it a little, and taste it before you serve it.",
    ),
    (
        "a linen coat|jeans|leather shoes|a silk scarf|trainers|a raincoat|gloves|a white shirt|a summer dress|socks|a suit|a hat|silver earrings|glasses|a wedding dress|boots|a swimsuit",
        "How do I {wash|clean|repair|choose|fold} {x}?|There is dust on {x}. Any advice?|What should I wear with {x}?|Where can I buy {x}?|My baby dropped {jam|milk|sauce} on {x}.|"
        "How do I make {x} last longer?|What size of {x} do I need?",
        "Look at the label of {x} first, be gentle, and let it dry in the air.",
    ),
    (
        "a scanner|a printer|a tablet|a camera|a vacuum cleaner|a dishwasher|a bicycle|a lamp|a bookshelf|a mattress|an old radio|a sewing machine|a tent|a drill|a ladder|a phone|"
        "a smart watch|headphones|a television|a fridge|a heater|a suitcase|a pram|a kitchen table",
        "Which {x} is good for a beginner?|How do I {repair|clean|set up|use|reset|choose} {x}?|{x} does not work any more.|How long does {x} last?|What should I look for in {x}?|"
        "Is it worth to repair {x}?|{x} is slow. What can I do?|where can i sell {x}|How much does {x} cost?",
        "For {x}, read the guide that came with it, check the simple things first, and compare prices before you buy.",
    ),
    (
        "Vienna|Lisbon|Kenya|New Zealand|a national park|the mountains|Thailand|Chicago|the Lake District|Rome|Japan|Seattle|the seaside|Iceland|a museum|the zoo|Peru|Dublin",
        "What can I {do|see|eat} in {x}?|Tell me about {x}.|What is the best time to visit {x}?|How do I get to {x}?|give me some tips for {x}|Is there a nice {hotel|restaurant|tour} in {x}?|"
        "What is the weather like in {x}?|Is there a train to {x}?|Is {x} good for children?|What should I pack for {x}?|Where does the name of {x} come from?",
        "In {x} there is a lot to see. Plan two or three things a day, and ask people there for good food.",
    ),
    (
        "my daughter|my son|my grandmother|my best friend|a new colleague|my teacher|my husband|my sister|a neighbour|my boss|a client|my parents|my team|my students|a guest|my roommate",
        "How do I {thank|surprise|cheer up|comfort|talk to|invite|help} {x}?|What is a good present for {x}?|What can I cook for {x}?|{x} is sad. What can I say?|I want to write a card for {x}.|"
        "How can I spend more time with {x}?|How do I say no to {x} in a kind way?|I had a small argument with {x}. What now?",
        "Listen well, be honest and kind, and take some time for {x}.",
    ),
    (
        "a puppy|an older dog|a kitten|a ferret|a rabbit|a parrot|a pony|chickens|a turtle|bees|a goldfish|a guinea pig|birds in the garden|a hedgehog",
        "How do I {feed|train|look after|wash} {x}?|What does {x} eat?|My children want {x}. What should I know?|How long does {x} live?|Why does {x} make that noise?|"
        "Is {x} a good pet for children?|Where should {x} sleep?",
        "For {x}, fresh water, the right food, space and patience matter most. A vet can tell you more.",
    ),
    (
        "the violin|Italian|touch typing|photography|cooking|yoga|algebra|programming|drawing|gardening|running|public speaking|chess|singing|knitting|biology|history|accounting|carpentry|dancing",
        "How do I {learn|practise|get better at|start with} {x}?|Where can I take a class in {x}?|How long does it take to learn {x}?|Is {x} hard?|Why is {x} useful?|What are the basics of {x}?|"
        "Can you explain {x} to me?|what do people like about {x}|Would you say {x} is fun?|Which book on {x} is good?",
        "With {x}, begin with the basics, practise a little each day, and look for a good teacher or book.",
    ),
    (
        "a postcard|a cover letter|a diary|a field report|a poem|a wedding invitation|a greeting card|a recipe book|a shopping list|a speech|a lesson plan|a family tree|a letter to a friend|a newsletter|"
        "a list of films|a travel blog|a short play|a song|a menu|a budget",
        "How do I {write|begin|finish} {x}?|Write {x}.|Create {x}|Help me with {x}.|What belongs in {x}?|Can you give me an example of {x}?|How long should {x} be?|Develop {x}|Please make {x} shorter.",
        "For {x}, think of the reader first, keep it short and clear, and read it aloud at the end.",
    ),
    (
        "a nurse|an electrician|a baker|a teacher|a pilot|a podcast host|a plumber|a vet|a librarian|a software engineer|a gardener|a museum guide|a firefighter|a tailor|an architect|a chef",
        "How do I become {x}?|What does {x} do all day?|How much does {x} earn?|What should I study to be {x}?|Is it hard to be {x}?|Should I become {x}?|Do I need experience to work as {x}?",
        "To work as {x}, learn the basics, get some practice, and talk to people who do the job.",
    ),
    (
        "a headache|a cold|stress|hiccups|back pain|dry skin|a cough|tired eyes|a sore knee|sore feet|cold hands|being shy|jet lag|hay fever|a stiff neck|low energy",
        "What helps with {x}?|My aunt has {x} again. Any ideas?|How do I deal with {x}?|What causes {x}?|Is {x} normal?|Can food help with {x}?|What are some tips for {x}?|When should I see a doctor about {x}?",
        "With {x}, rest, water, fresh air and good sleep often help. See a doctor if it stays.",
    ),
    (
        "photosynthesis|the moon|corals|volcanoes|plant roots|the French Revolution|jazz|electric cars|the water cycle|rainbows|the stock market|the Olympics|Shakespeare|vitamins|atoms|whales|"
        "olives|the human heart|democracy|glaciers|nursery rhymes|western films|the alphabet|school uniforms|puppet theatre|the Great Lakes",
        "What {is|are} {x}?|Please explain {x} to me.|Tell me about {x}.|Why {is|are} {x} important?|Where can I learn more about {x}?|How {does|do} {x} work?|What should a child know about {x}?|"
        "What do people think about {x}?|Name three facts about {x}.|Who first wrote about {x}?",
        "There is a lot to say about {x}. A library or an encyclopedia gives the facts with dates and names.",
    ),
    (
        "a tea party|a barbecue|a garden|a weekend|a rainy day|Christmas|an anniversary|a small flat|a first date|a wedding|a baby shower|a long drive|a power cut|a summer fair|an evening at home|"
        "a move to a new house|the school holidays|a charity run",
        "How do I {plan|prepare for|organise} {x}?|What do I need for {x}?|Give me ideas for {x}.|How can I make {x} nicer?|How much money should I plan for {x}?|What music fits {x}?|When should I start with {x}?",
        "For {x}, make a short list, start early, keep it simple, and ask a friend to help.",
    ),
]


def questions(split: str) -> list[tuple[str, str]]:
    """(question, answer) pairs; `split` is "train" or "evaluation"."""
    rows = []
    for things, asked, answer in KINDS:
        for thing in things.split("|"):
            for question in _split(asked):
                for text in expand(question.replace("{x}", thing)):
                    text = text[0].upper() + text[1:] if text[-1] in "?.!" else text
                    if (bucket(text) >= 100 - EVALUATION_SHARE) == (split == "evaluation"):
                        rows.append((text, answer.format(x=thing)))
    return rows


def _split(asked: str) -> list[str]:
    """Questions between the bars that are not inside a choice."""
    parts, depth, current = [], 0, ""
    for mark in asked:
        depth += (mark == "{") - (mark == "}")
        if mark == "|" and not depth:
            parts.append(current)
            current = ""
        else:
            current += mark
    return [*parts, current]
