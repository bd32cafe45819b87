// openai-node: the server is told by the environment (tests/clients/run.py).

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import test from "node:test";
import OpenAI, { toFile } from "openai";

const model = process.env.CLIENTS_MODEL;
const options = {
  baseURL: `${process.env.CLIENTS_URL}/v1`,
  apiKey: process.env.CLIENTS_API_KEY,
  timeout: 60_000,
  maxRetries: 0,
};
const client = new OpenAI(options);
const picture = await readFile(`${process.env.CLIENTS_REPOSITORY}/docs/example.png`);

const asked = (content, more = {}) => ({
  model,
  messages: [{ role: "user", content }],
  temperature: 0,
  max_completion_tokens: 100,
  ...more,
});

const shape = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] }, count: { enum: [1, 2, 3] } },
  required: ["colour", "count"],
  additionalProperties: false,
};

test("the model is listed", async () => {
  const ids = [];
  for await (const each of client.models.list()) ids.push(each.id);
  assert.deepEqual(ids, [model]);
});

test("chat answers whole, and streams the same", async () => {
  const request = asked("안녕하세요");
  const whole = await client.chat.completions.create(request);
  assert.equal(whole.choices[0].finish_reason, "stop");
  assert.ok(whole.choices[0].message.content);
  const stream = await client.chat.completions.create({
    ...request,
    stream: true,
    stream_options: { include_usage: true },
  });
  let said = "";
  let usage = null;
  for await (const chunk of stream) {
    said += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(said, whole.choices[0].message.content);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper adds up to a completion", async () => {
  const runner = client.chat.completions.stream(asked("Who are you?"));
  const final = await runner.finalChatCompletion();
  const whole = await client.chat.completions.create(asked("Who are you?"));
  assert.equal(final.choices[0].message.content, whole.choices[0].message.content);
});

test("a stream can be left", async () => {
  const stream = await client.chat.completions.create(asked("Who are you?", { stream: true }));
  for await (const chunk of stream) {
    assert.equal(chunk.choices[0].delta.role, "assistant");
    break;
  }
});

test("pictures are seen: by data URL, by http and as a file", async () => {
  const stored = await client.files.create({
    file: await toFile(picture, "example.png"),
    purpose: "vision",
  });
  const parts = [
    {
      type: "image_url",
      image_url: { url: `data:image/png;base64,${picture.toString("base64")}` },
    },
    { type: "image_url", image_url: { url: process.env.CLIENTS_PICTURE_URL } },
    { type: "file", file: { file_id: stored.id } },
  ];
  for (const part of parts) {
    const content = [part, { type: "text", text: "What is in the picture?" }];
    const answer = await client.chat.completions.create(asked(content));
    assert.equal(answer.choices[0].message.content, "A red circle and a blue square.");
  }
  assert.equal((await client.files.delete(stored.id)).deleted, true);
});

test("an answer keeps to a schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "shape", schema: shape } };
  const answer = await client.chat.completions.create(asked("A shape.", { response_format }));
  const told = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(told), ["colour", "count"]);
});

test("errors are the client's own classes", async () => {
  await assert.rejects(
    client.chat.completions.create(asked("hi", { top_p: 7 })),
    (error) =>
      error instanceof OpenAI.BadRequestError &&
      error.status === 400 &&
      error.param === "top_p" &&
      error.code === "invalid_value" &&
      error.type === "invalid_request_error" &&
      Boolean(error.requestID),
  );
  await assert.rejects(
    client.chat.completions.create(asked("circle ".repeat(3000))),
    (error) => error.code === "context_length_exceeded",
  );
  await assert.rejects(
    new OpenAI({ ...options, apiKey: "wrong" }).models.list(),
    (error) => error instanceof OpenAI.AuthenticationError && error.code === "invalid_api_key",
  );
  await assert.rejects(
    client.chat.completions.create({ ...asked("hi"), model: "gpt-4o" }),
    (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found",
  );
});

const drawing = {
  type: "function",
  function: { name: "draw", description: "Draws a shape.", parameters: shape, strict: true },
};

test(
  "a tool is called whole and streamed, and its result answered",
  async () => {
    const request = asked("Draw.", {
      tools: [drawing],
      tool_choice: "required",
      parallel_tool_calls: false, // else the demo model calls without end
    });
    const whole = (await client.chat.completions.create(request)).choices[0];
    assert.equal(whole.finish_reason, "tool_calls");
    const [call] = whole.message.tool_calls;
    assert.equal(call.type, "function");
    assert.equal(call.function.name, "draw");
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["colour", "count"]);
    const streamed = await client.chat.completions.stream(request).finalChatCompletion();
    const again = streamed.choices[0].message.tool_calls[0];
    assert.deepEqual(again.function.arguments, call.function.arguments);
    const messages = [
      ...request.messages,
      whole.message,
      { role: "tool", tool_call_id: call.id, content: "Done." },
    ];
    const end = await client.chat.completions.create({
      ...request,
      messages,
      tool_choice: "none",
    });
    assert.ok(["stop", "length"].includes(end.choices[0].finish_reason));
  },
);

test(
  "the helper runs a tool",
  async () => {
    const called = [];
    const runner = client.chat.completions.runTools(
      asked("Draw.", {
        tools: [
          {
            type: "function",
            function: {
              ...drawing.function,
              parse: JSON.parse,
              function: (told) => {
                called.push(told);
                return "Done.";
              },
            },
          },
        ],
        tool_choice: { type: "function", function: { name: "draw" } },
      }),
    );
    await runner.finalChatCompletion();
    assert.deepEqual(Object.keys(called[0]), ["colour", "count"]);
  },
);

test(
  "a response is given whole and streamed",
  async () => {
    const request = {
      model,
      input: [
        {
          role: "user",
          content: [
            {
              type: "input_image",
              image_url: `data:image/png;base64,${picture.toString("base64")}`,
              detail: "auto",
            },
            { type: "input_text", text: "What is in the picture?" },
          ],
        },
      ],
      temperature: 0,
      store: false,
    };
    const whole = await client.responses.create(request);
    assert.equal(whole.output_text, "A red circle and a blue square.");
    const streamed = await client.responses.stream(request).finalResponse();
    assert.equal(streamed.output_text, whole.output_text);
  },
);
