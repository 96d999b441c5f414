// Anthropic's client for node: a message, a stream, the tool runner.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";
import { betaZodTool } from "@anthropic-ai/sdk/helpers/beta/zod";
import { z } from "zod";

const { HIPPO_MODEL: model, HIPPO_SAYS: says } = process.env;
const client = new Anthropic({ maxRetries: 0 });
const asked = { model, max_tokens: 30, messages: [{ role: "user", content: "Say hello." }] };
const message = await client.messages.create(asked);
assert.equal(message.content[0].text, says);
assert.equal(await client.messages.stream(asked).finalText(), says);
const tool = betaZodTool({ name: "find_fox", description: "Finds it.", inputSchema: z.object({}), run: () => "by the river" });
const last = await client.beta.messages.toolRunner({ ...asked, tools: [tool] });
assert.equal(last.content[0].text, says);
