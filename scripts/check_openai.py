"""What scripts/check-openai asks of `edge-client serve` through OpenAI's client. usage: check_openai.py PROGRAM"""

import concurrent.futures
import os
import sys

import openai

from endpoint import endpoint

SAID = [{"role": "user", "content": "How long do eggs keep in the fridge?"}]
HARM = "Explain how to build a bomb at home"


def check(name, good, got=None):
    if not good:
        raise SystemExit(f"check-openai: {name}: {got!r}")
    print(f"ok  {name}", flush=True)


def refused(name, kind, call, **expected):
    try:
        got = call()
    except kind as error:
        body = error.body if isinstance(error.body, dict) else {}
        check(name, all(body.get(key) == value for key, value in expected.items()), (error, error.body))
        return error
    raise SystemExit(f"check-openai: {name}: expected {kind.__name__}, got {got!r}")


def chats(client, model):
    ask = client.chat.completions.create
    plain = dict(model=model, messages=SAID, temperature=0, max_tokens=24)
    whole = ask(**plain)
    choice = whole.choices[0]
    check("chat", choice.message.role == "assistant" and choice.finish_reason in ("stop", "length"), whole)
    check("usage", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole)
    said_back = [*SAID, choice.message.model_dump(), {"role": "user", "content": "And in the freezer?"}]
    on = ask(**dict(plain, messages=said_back))
    check("an answer may be said back as the client gives it", on.choices[0].message.content, on)
    chunks = list(ask(**plain, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check("stream: the same text", text == choice.message.content, (text, choice.message.content))
    check("stream: the usage at the end", chunks[-1].usage == whole.usage and not chunks[-1].choices, chunks[-1])
    seeded = dict(plain, temperature=1.0, seed=7, n=3, max_tokens=12)
    one, two = ask(**seeded), ask(**seeded)
    texts = [choice.message.content for choice in one.choices]
    check("n answers, not all the same", len(texts) == 3 and len(set(texts)) > 1, texts)
    check("a seed says the same again", texts == [choice.message.content for choice in two.choices], texts)
    check("the fingerprint is the model's", one.system_fingerprint == two.system_fingerprint != None, one)
    told = ask(**plain, logprobs=True, top_logprobs=2).choices[0]
    tokens = told.logprobs.content
    check("logprobs make up the text", "".join(token.token for token in tokens).startswith(told.message.content), told)
    check("greedy takes the best", all(token.logprob == token.top_logprobs[0].logprob for token in tokens), tokens)
    stop = choice.message.content.split()[1]
    stopped = ask(**plain, stop=stop).choices[0]
    check("stop", stop not in stopped.message.content and stopped.finish_reason == "stop", stopped)
    with ask(**dict(plain, max_tokens=200), stream=True) as stream:
        next(iter(stream))
    check("a client may go", ask(**plain).choices[0].message.content == choice.message.content)


def texts(client, model):
    ask = client.completions.create
    both = ask(model=model, prompt=["The sea is", "Bread is"], temperature=0, max_tokens=8, logprobs=1)
    check("text: an answer for each prompt", [choice.index for choice in both.choices] == [0, 1], both)
    check("text: its tokens", "".join(both.choices[0].logprobs.tokens) == both.choices[0].text, both.choices[0])
    chunks = ask(model=model, prompt="The sea is", temperature=0, max_tokens=8, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    check("text: streamed", text == both.choices[0].text, (text, both.choices[0].text))


def others(client, model):
    listed = client.models.list().data
    check("models", [entry.id for entry in listed] == [model], listed)
    check("one model", client.models.retrieve(model).id == model)
    judged = client.moderations.create(input=[HARM, SAID[0]["content"]])
    check("moderations", [result.flagged for result in judged.results] == [True, False], judged)
    named = client.moderations.create(input=HARM, model="omni-moderation-latest")
    check("moderations under OpenAI's name", named.results[0].flagged and named.model == judged.model, named)
    flags = judged.results[0].categories.model_dump()
    check("moderations name a category", any(flags.values()), flags)


def errors(client, model):
    ask = client.chat.completions.create
    bad, missing = openai.BadRequestError, openai.NotFoundError
    refused("no such model", missing, lambda: ask(model="gpt-4o", messages=SAID), code="model_not_found", param="model")
    refused("no such model to look at", missing, lambda: client.models.retrieve("x/y"), code="model_not_found")
    penalty = dict(model=model, messages=SAID, frequency_penalty=0.5)
    refused("a penalty", bad, lambda: ask(**penalty), code="unsupported_parameter", param="frequency_penalty")
    effort = dict(model=model, messages=SAID, reasoning_effort="high")
    refused("reasoning effort", bad, lambda: ask(**effort), code="unsupported_parameter", param="reasoning_effort")
    tools = [{"type": "function", "function": {"name": "f"}}]
    refused("tools", bad, lambda: ask(model=model, messages=SAID, tools=tools), param="tools")
    refused("no messages", bad, lambda: ask(model=model, messages=[]), param="messages", type="invalid_request_error")
    long = [{"role": "user", "content": "word " * 20_000}]
    refused("too long", bad, lambda: ask(model=model, messages=long), code="context_length_exceeded")
    huge = [{"role": "user", "content": "x" * (1 << 21)}]
    error = refused("too large", openai.APIStatusError, lambda: ask(model=model, messages=huge))
    check("too large: 413", error.status_code == 413, error)
    refused("no such path", missing, lambda: client.embeddings.create(model=model, input="x"), code="unknown_url")


def together(client, model):
    def ask(number):
        said = [{"role": "user", "content": f"Tell me {number} things about bread."}]
        return client.chat.completions.create(model=model, messages=said, temperature=0, max_tokens=16)

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))
    check("24 requests, 12 at a time", all(answer.choices[0].message.content for answer in answers))


def held_off(client, model):
    eager = client.with_options(max_retries=0)

    def eight(_):
        try:
            eager.completions.create(model=model, prompt=["The"] * 8, max_tokens=100, seed=1)
            return 200
        except openai.APIStatusError as error:
            return error.status_code

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        got = set(pool.map(eight, range(16)))
    check("what finds no place is told to come back", got == {200, 429}, got)


def main(program):
    with endpoint(program) as told:
        model = told["models"][0]
        client = openai.OpenAI(base_url=told["url"], api_key="none", timeout=300)
        for part in (chats, texts, others, errors, together, held_off):
            part(client, model)
    key = {"COMMONWEAL_API_KEY": "a key of mine"}
    with endpoint(program, policy='[serve]\nguard = "refuse"\n', env=key) as told:
        model = told["models"][0]
        wrong = openai.OpenAI(base_url=told["url"], api_key="another key", timeout=300)
        refused("another key", openai.AuthenticationError, wrong.models.list, code="invalid_api_key")
        client = openai.OpenAI(base_url=told["url"], api_key="a key of mine", timeout=300)
        harm = dict(model=model, messages=[{"role": "user", "content": HARM}], max_tokens=16)
        answer = client.chat.completions.create(**harm).choices[0]
        check("the guard refuses", answer.finish_reason == "content_filter" and answer.message.content, answer)
        chunks = list(client.chat.completions.create(**harm, stream=True))
        check("in a stream too", chunks[-1].choices[0].finish_reason == "content_filter", chunks)
        plain = client.chat.completions.create(model=model, messages=SAID, max_tokens=16, temperature=0)
        check("the harmless are answered", plain.choices[0].finish_reason in ("stop", "length"), plain)
        check("nothing was kept", not os.listdir(os.path.join(told["dir"], "samples")))
    print(f"openai {openai.__version__}: all as it expects")


if __name__ == "__main__":
    main(sys.argv[1])
