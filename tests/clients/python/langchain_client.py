"""LangChain: completions (which it always sends as a list), chats, formats, tools; its own error for a long prompt."""

import os
from typing import Literal

from langchain_anthropic import ChatAnthropic
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

MODEL, SAYS = os.environ["HIPPO_MODEL"], os.environ["HIPPO_SAYS"]


class Place(BaseModel):
    at: Literal["river", "wood"]


chat = ChatOpenAI(model=MODEL, max_retries=0)
assert chat.invoke("Say hello.").content == SAYS
assert "".join(chunk.content for chunk in chat.stream("Say hello.")) == SAYS
assert OpenAI(model=MODEL, max_retries=0, max_tokens=6).invoke("Once").strip() == SAYS
assert ChatOpenAI(model=MODEL, reasoning={"effort": "low"}).invoke("Say hello.").text == SAYS
for structured in (
    chat.with_structured_output(Place, method="json_schema"),
    ChatAnthropic(model=MODEL, max_tokens=60, api_key="none").with_structured_output(Place, method="json_schema"),
):
    assert structured.invoke("Where?").at in ("river", "wood")
try:
    chat.invoke("fox " * 101_000)
except Exception as error:
    assert "ContextOverflow" in "".join(kind.__name__ for kind in type(error).__mro__), type(error).__mro__
else:
    raise AssertionError("too long a prompt was taken")
