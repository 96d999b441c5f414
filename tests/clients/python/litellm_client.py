"""litellm: chats, completions, Anthropic's messages over OpenAI's responses, its own error for a long prompt."""

import asyncio
import os

import litellm

MODEL, SAYS, URL = os.environ["HIPPO_MODEL"], os.environ["HIPPO_SAYS"], os.environ["HIPPO_URL"]
USER = {"role": "user", "content": "Say hello."}
asked = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none"}
assert litellm.completion(messages=[USER], **asked).choices[0].message.content == SAYS
assert litellm.completion(messages=[USER], reasoning_effort="low", allowed_openai_params=["reasoning_effort"], **asked)
texts = litellm.text_completion(
    prompt=["Once", "Twice"], max_tokens=6, **{**asked, "model": f"text-completion-openai/{MODEL}"}
)
assert [choice.text.strip() for choice in texts.choices] == [SAYS, SAYS]
bridged = asyncio.run(litellm.anthropic.messages.acreate(messages=[USER], max_tokens=30, **asked))
assert bridged["content"][0]["text"] == SAYS
try:
    litellm.completion(messages=[{"role": "user", "content": "fox " * 101_000}], **asked)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("too long a prompt was taken")
