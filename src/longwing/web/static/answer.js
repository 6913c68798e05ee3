// One answer: from messages to a prompt's tokens, from those to text that streams in.
//
// The server writes the messages into the chosen template, so that a special token in a document
// stays text; the tokens go to /v1/completions, which says how far the prompt is read, each piece of
// text, and how many tokens of the prompt were remembered.

import { ApiError, call, events, post } from "./api.js";
import { sampling, template } from "./params.js";
import { longest, tooLarge } from "./session.js";

/**
 * Ask for an answer.
 *
 * Args, in one object: `messages`; `goOn`: whether to continue the last one; `signal`: aborts;
 * `onReading(done, total)` while the prompt is read; `onText(text)` with the whole text so far.
 *
 * Returns {text, finish, usage, seconds, firstSeconds}; `finish` is "stop", "length" or "stopped".
 * Throws ApiError if there is no answer, with what came so far in `error.text`.
 */
export async function answer({ messages, goOn = false, signal, onReading, onText }) {
  const began = performance.now();
  const told = { text: "", finish: null, usage: null, seconds: 0, firstSeconds: null };
  const elapsed = () => (performance.now() - began) / 1000;
  try {
    const asked = { messages, template: template(), continue_final: goOn };
    const prompt = await post("/ui/api/prompt", asked, { signal });
    told.usage = { prompt: prompt.ids.length, cached: 0, generated: 0 };
    onReading(0, prompt.ids.length);
    const body = JSON.stringify({
      prompt: prompt.ids,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
      ...sampling(longest() - prompt.ids.length),
    });
    const refusal = tooLarge(body.length);
    if (refusal) throw new ApiError(413, refusal);
    const sent = { method: "POST", signal, body, type: "application/json" };
    const response = await call("/v1/completions", sent);
    for await (const { reading, data } of events(response)) {
      if (reading) onReading(reading.done, reading.total);
      else take(data, told, elapsed, onText);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw Object.assign(error, { text: told.text });
    told.finish = "stopped";
  }
  told.seconds = elapsed();
  return told;
}

function take(data, told, elapsed, onText) {
  if (data.usage) {
    told.usage = {
      prompt: data.usage.prompt_tokens,
      cached: Math.max(told.usage.cached, data.usage.prompt_tokens_details?.cached_tokens ?? 0),
      generated: data.usage.completion_tokens,
    };
  }
  const choice = data.choices[0];
  if (!choice) return;
  if (choice.finish_reason) told.finish = choice.finish_reason;
  if (!choice.text) return;
  told.firstSeconds ??= elapsed();
  told.text += choice.text;
  onText(told.text, told.usage);
}
