// Vercel's AI SDK through three providers: texts, streams, objects.
import assert from "node:assert";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const { HIPPO_MODEL: model, HIPPO_SAYS: says, HIPPO_URL: url } = process.env;
const options = { baseURL: `${url}/v1`, apiKey: "none" };
const compatible = createOpenAICompatible({ name: "hippo", ...options, supportsStructuredOutputs: true });
const models = [compatible(model), createOpenAI(options)(model), createOpenAI(options).chat(model), createAnthropic(options)(model)];
for (const one of models) {
  const asked = { model: one, system: "Be brief.", prompt: "Say hello.", maxRetries: 0 };
  assert.equal((await generateText(asked)).text, says);
  let streamed = "";
  for await (const text of streamText(asked).textStream) streamed += text;
  assert.equal(streamed, says);
}
const schema = z.object({ at: z.enum(["river", "wood"]) });
const { object } = await generateObject({ model: compatible(model), schema, prompt: "Where?", maxRetries: 0 });
assert.ok(["river", "wood"].includes(object.at));
