// What the server is: asked for when the page opens, and now and then after that.
//
// Views listen by `onState`. While something is loading or being fetched the server is asked each
// second, else every ten, and only while the page is seen.

import { get } from "./api.js";
import { count } from "./dom.js";

const listeners = new Set();
let state = null;
let session = null;
let timer = null;

/** What /ui/api/session said; null before it did. */
export const theSession = () => session;

/** What /ui/api/state said last; null if the server does not answer. */
export const theState = () => state;

/** Tokens that a prompt and its answer may have together. */
export const longest = () => state?.model?.max_total_len ?? Infinity;

/** Tokens that a prompt may have. */
export const longestPrompt = () => state?.model?.max_input_len ?? Infinity;

/** Why a request of so many bytes cannot be sent, or "" if it can. */
export function tooLarge(size) {
  const most = session?.limits.payload_bytes ?? Infinity;
  if (size <= most) return "";
  const enough = Math.ceil((1.05 * size) / 1e5) * 1e5;
  return `A prompt of ${count(size)} bytes is more than the ${count(most)} that the server takes. Start it with --payload-limit ${enough}, or ask about less.`;
}

/** Call `listener(state)` now, if there is a state, and each time it is heard of. */
export function onState(listener) {
  listeners.add(listener);
  if (state) listener(state);
}

/** Ask now; also after anything that changes what the server does. */
export async function refreshState({ quiet = false } = {}) {
  clearTimeout(timer);
  try {
    session ??= await get("/ui/api/session", { quiet });
    state = await get("/ui/api/state", { quiet });
  } catch (error) {
    state = null;
    problem = error;
  }
  for (const listener of listeners) listener(state);
  if (!document.hidden) timer = setTimeout(() => refreshState({ quiet: true }), pause());
  return state;
}

let problem = null;

/** The names that requests may ask for: the model's own first, then its adapters'. */
export async function theNames() {
  const { data } = await get("/v1/models", { quiet: true });
  return data.map(({ id }) => id);
}

/** Why there is no state: an ApiError. */
export const theProblem = () => problem;

function pause() {
  if (!state) return 3000;
  const phase = state.loading?.phase;
  const busy = phase === "draining" || phase === "loading" || state.status === "starting";
  return busy || state.downloads_running ? 1000 : 10_000;
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refreshState({ quiet: true });
});
