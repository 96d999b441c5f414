"""OpenAI's client: chat, completions of lists, responses, formats, tools, a prompt that is too long."""

import os

import openai
from pydantic import BaseModel

MODEL, SAYS = os.environ["HIPPO_MODEL"], os.environ["HIPPO_SAYS"]
USER = {"role": "user", "content": "Say hello."}
client = openai.OpenAI(max_retries=0)


class Place(BaseModel):
    at: set[bool]


answer = client.chat.completions.create(
    model=MODEL, messages=[{"role": "developer", "content": "Be brief."}, USER], prompt_cache_key="k", verbosity="low",
    reasoning_effort="low", modalities=["text"], prediction={"type": "content", "content": "Hello"},
)  # fmt: skip
assert answer.choices[0].message.content == SAYS and answer._request_id
with client.chat.completions.stream(model=MODEL, messages=[USER], stream_options={"include_usage": True}) as stream:
    assert stream.get_final_completion().choices[0].message.content == SAYS
asked = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
called = client.chat.completions.create(model=MODEL, messages=[USER], tools=[asked], tool_choice="required").choices[0]
assert called.message.tool_calls[0].function.name == "find"
texts = client.completions.create(model=MODEL, prompt=["Once", "Twice"], n=2, best_of=2, max_tokens=3).choices
assert [choice.index for choice in texts] == [0, 1, 2, 3]
parsed = client.chat.completions.parse(model=MODEL, messages=[USER], response_format=Place, max_tokens=60)
assert parsed.choices[0].message.parsed or parsed.choices[0].finish_reason == "length"
answer = client.responses.create(
    model=MODEL, input="Say hello.", include=["reasoning.encrypted_content"], reasoning={"effort": "low", "summary": "detailed"},
    text={"verbosity": "low"}, truncation="auto", prompt_cache_retention="24h",
)  # fmt: skip
assert answer.output_text == SAYS
try:
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "fox " * 101_000}])
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded" and error.param == "messages"
else:
    raise AssertionError("too long a prompt was taken")
assert client.models.retrieve(MODEL).created > 1.7e9
