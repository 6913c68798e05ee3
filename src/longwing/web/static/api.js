// Talking to the server: JSON, streams of server-sent events, keys, and errors as sentences.
//
// A stream tells two things: comments `: reading 4096/12480` while the prompt is read, and `data:`
// lines. Keys stay in this browser tab (sessionStorage) and are asked for when the server wants one.

import { $ } from "./dom.js";

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

const KEYS = { api: "longwing.api-key", admin: "longwing.admin-key" };

function headers(extra) {
  const made = { ...extra };
  const [api, admin] = [KEYS.api, KEYS.admin].map((name) => sessionStorage.getItem(name));
  if (api) made.Authorization = `Bearer ${api}`;
  if (admin) made["X-Admin-Key"] = admin;
  return made;
}

/**
 * Call a route. A refusal for want of a key asks for it and tries again, as long as one is given; not
 * so if the call is `quiet`, which is what nobody waits for.
 *
 * Throws ApiError for every answer that is not a 2xx, and with status 0 if there is no answer.
 */
export async function call(path, { method = "GET", json, body, type, signal, quiet = false } = {}) {
  const sent = json === undefined ? body : JSON.stringify(json);
  const kind = json === undefined ? type : "application/json";
  for (;;) {
    let response;
    try {
      response = await fetch(path, {
        method,
        body: sent,
        signal,
        headers: headers(kind ? { "Content-Type": kind } : {}),
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    const refusal = await refused(response);
    const wanted = quiet ? null : wantedKey(response, refusal);
    if (!wanted || !(await askForKey(wanted, refusal.message))) throw refusal;
  }
}

/** The JSON that a route answers. */
export const get = async (path, options) => (await call(path, options)).json();

/** The JSON that a route answers to some JSON. */
export const post = async (path, json, options) =>
  (await call(path, { method: "POST", json, ...options })).json();

async function refused(response) {
  const text = await response.text();
  try {
    return sentence(response.status, JSON.parse(text));
  } catch {
    return new ApiError(
      response.status,
      text.slice(0, 300) || `The server answered ${response.status}.`,
    );
  }
}

/** OpenAI's errors are objects in `error`; TGI's and the page's own are texts there. */
function sentence(status, body) {
  const { error } = body;
  if (error && typeof error === "object") return new ApiError(status, error.message, error.code);
  return new ApiError(
    status,
    error || body.detail || `The server answered ${status}.`,
    body.error_type,
  );
}

function wantedKey(response, refusal) {
  if (response.status === 401) return "api";
  return response.status === 403 && refusal.code === "admin_key" ? "admin" : null;
}

/** Ask for a key in a dialog; false if none was given. */
function askForKey(kind, reason) {
  const dialog = $("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  $("key-title").textContent = kind === "admin" ? "Admin key" : "API key";
  $("key-reason").textContent = reason;
  const field = $("key-field");
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use" && field.value.trim();
        if (given) sessionStorage.setItem(KEYS[kind], given);
        resolve(Boolean(given));
      },
      { once: true },
    );
  });
}

/**
 * What a stream says, piece by piece: `{reading: {done, total}}` or `{data: …}`.
 *
 * Ends with [DONE] or the stream. Throws ApiError if the server sends an error in it.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The connection to the server broke.");
    });
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const reading = /^: reading (\d+)\/(\d+)/.exec(line);
      if (reading) yield { reading: { done: Number(reading[1]), total: Number(reading[2]) } };
      if (!line.startsWith("data:")) continue;
      const text = line.slice(5).trim();
      if (text === "[DONE]") return;
      const data = JSON.parse(text);
      if (data.error) throw sentence(500, data);
      yield { data };
    }
  }
}
