// OpenAI's client for node: a chat, a stream, a list of prompts, a response.
import assert from "node:assert";
import OpenAI from "openai";

const { HIPPO_MODEL: model, HIPPO_SAYS: says } = process.env;
const client = new OpenAI({ maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const chat = await client.chat.completions.create({ model, messages, verbosity: "low" });
assert.equal(chat.choices[0].message.content, says);
assert.ok(chat._request_id);
const stream = client.chat.completions.stream({ model, messages });
assert.equal(await stream.finalContent(), says);
const texts = await client.completions.create({ model, prompt: ["Once", "Twice"], max_tokens: 6 });
assert.deepEqual(texts.choices.map((choice) => choice.text.trim()), [says, says]);
const response = await client.responses.create({ model, input: "Say hello.", include: ["reasoning.encrypted_content"] });
assert.equal(response.output_text, says);
