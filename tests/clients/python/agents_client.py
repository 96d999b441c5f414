"""openai-agents, pydantic-ai and instructor: an agent's run each, with all the settings that were refused once."""

import asyncio
import os
from typing import Literal

import agents
import instructor
import openai
from openai.types.shared import Reasoning
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings

MODEL, SAYS = os.environ["HIPPO_MODEL"], os.environ["HIPPO_SAYS"]


class Place(BaseModel, extra="forbid"):
    at: Literal["river", "wood"]


agents.set_tracing_disabled(True)
settings = agents.ModelSettings(
    verbosity="low", prompt_cache_retention="24h", response_include=["reasoning.encrypted_content"],
    reasoning=Reasoning(effort="low", summary="auto"),
)  # fmt: skip
for kind in (agents.OpenAIChatCompletionsModel, agents.OpenAIResponsesModel):
    agent = agents.Agent(
        "fox", instructions="Be brief.", model=kind(MODEL, openai.AsyncOpenAI()), model_settings=settings
    )
    assert asyncio.run(agents.Runner.run(agent, "Say hello.")).final_output == SAYS
settings = OpenAIChatModelSettings(openai_prompt_cache_key="k", openai_reasoning_effort="low")
assert Agent(OpenAIChatModel(MODEL), model_settings=settings).run_sync("Say hello.").output == SAYS
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):
    client = instructor.from_openai(openai.OpenAI(), mode=mode)
    found = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Where?"}], response_model=Place, max_retries=1
    )
    assert found.at in ("river", "wood"), mode
