"""Anthropic's client: messages, streams, formats, the tool runner, a begun answer, counting."""

import os
from typing import Literal

import anthropic
from pydantic import BaseModel

MODEL, SAYS = os.environ["HIPPO_MODEL"], os.environ["HIPPO_SAYS"]
USER = {"role": "user", "content": "Say hello."}
client = anthropic.Anthropic(max_retries=0)


class Place(BaseModel):
    at: Literal["river", "wood"]


@anthropic.beta_tool
def find_fox() -> str:
    """Find the fox."""
    return "by the river"


answer = client.messages.create(model=MODEL, max_tokens=30, messages=[USER], system="Be brief.")
assert answer.content[0].text == SAYS and answer.stop_reason == "end_turn" and answer._request_id
with client.messages.stream(model=MODEL, max_tokens=30, messages=[USER], thinking={"type": "adaptive"}) as stream:
    assert stream.get_final_text() == SAYS
parsed = client.messages.parse(model=MODEL, max_tokens=60, messages=[USER], output_format=Place)
assert parsed.parsed_output.at in ("river", "wood")
runner = client.beta.messages.tool_runner(model=MODEL, max_tokens=30, messages=[USER], tools=[find_fox])
assert runner.until_done().content[0].text == SAYS
begun = client.messages.create(model=MODEL, max_tokens=30, messages=[USER, {"role": "assistant", "content": "Hello"}])
assert f"Hello{begun.content[0].text}" == SAYS
assert client.messages.count_tokens(model=MODEL, messages=[USER]).input_tokens > 3
assert [model.id for model in client.models.list()] == [MODEL]
