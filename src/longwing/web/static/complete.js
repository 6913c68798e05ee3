// The Complete tab: a text goes on as the model would have it, and every token shows what else it
// might have been.
//
// The server sends, with each piece of text, the tokens it is made of, their log-probabilities and
// the likeliest in their place. A token that is pointed at or reached by the arrow keys opens a card;
// choosing another token there goes on from that place.

import { call, events } from "./api.js";
import { $, announce, copy, count, h, iconButton, seconds } from "./dom.js";
import { sampling } from "./params.js";
import { onState, theSession, theState, tooLarge } from "./session.js";
import { keepSetting, setting } from "./store.js";

const field = () => $("complete-prompt");
let abort = null;
let tokens = []; // {piece, logprob, top: [[text, logprob]…], element}
let text = []; // of the answer, as characters: places count characters, not UTF-16 units
let active = -1;

/** Set the tab up. */
export function startComplete() {
  field().value = setting("complete-prompt", "");
  field().addEventListener("change", () => keepSetting("complete-prompt", field().value));
  field().addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  });
  $("complete-run").addEventListener("click", () => run());
  $("complete-stop").addEventListener("click", () => abort?.abort());
  $("complete-tint").addEventListener("change", tint);
  $("complete-actions").append(
    iconButton("copy", "Copy", () => copy(field().value + text.join("")), { word: true }),
    iconButton("up", "Move into the text", takeIn, { word: true }),
  );
  startTokens();
  $("complete-tint").checked = setting("tint", true);
  tint();
  onState(refresh);
  refresh();
}

function tint() {
  $("tokens").classList.toggle("tinted", $("complete-tint").checked);
  keepSetting("tint", $("complete-tint").checked);
}

function refresh() {
  const state = theState();
  $("complete-run").disabled = Boolean(state && state.status !== "ready");
  $("complete-run").hidden = abort !== null;
  $("complete-stop").hidden = abort === null;
  $("complete-actions").hidden = abort !== null || !text.length;
}

/** Go on from the field's text; `kept` are tokens that stay, `forced` is a token put after them. */
async function run(kept = [], forced = "") {
  if (abort) return;
  const prompt = field().value + kept.map((token) => token.piece).join("") + forced;
  if (!prompt) {
    say("Write something for the model to go on from.");
    return;
  }
  const refusal = tooLarge(new Blob([prompt]).size);
  if (refusal) {
    say(refusal, true);
    return;
  }
  keepSetting("complete-prompt", field().value);
  abort = new AbortController();
  show(kept);
  if (forced) add({ piece: forced, logprob: null, top: [] });
  hideCard();
  refresh();
  const own = text.length;
  const began = performance.now();
  say("Reading");
  try {
    const response = await call("/v1/completions", {
      method: "POST",
      signal: abort.signal,
      json: {
        prompt,
        stream: true,
        logprobs: Math.min(5, theSession()?.limits.max_top_n_tokens ?? 5),
        stream_options: { include_usage: true },
        ...sampling(),
      },
    });
    let usage = null;
    for await (const { reading, data } of events(response)) {
      if (reading) say(`Reading ${count(reading.done)} of ${count(reading.total)} tokens`);
      usage = data?.usage ?? usage;
      if (data?.choices.length) take(data.choices[0], own);
    }
    const took = (performance.now() - began) / 1000;
    say(`${count(usage?.completion_tokens ?? tokens.length)} tokens in ${seconds(took)}`);
    announce(`The text goes on: ${text.join("").slice(0, 600)}`);
  } catch (error) {
    say(
      error.name === "AbortError" ? "Stopped by you" : error.message,
      error.name !== "AbortError",
    );
  }
  abort = null;
  refresh();
}

function say(words, isError = false) {
  const line = $("complete-status");
  line.textContent = words;
  line.classList.toggle("error", isError);
}

/** A piece of the stream: text, and the tokens whose text has begun. */
function take(choice, own) {
  text.push(...choice.text);
  const { logprobs } = choice;
  (logprobs?.tokens ?? []).forEach((name, place) => {
    const top = Object.entries(logprobs.top_logprobs[place] ?? {}).sort((a, b) => b[1] - a[1]);
    add({
      piece: "",
      name,
      from: own + logprobs.text_offset[place],
      top,
      logprob: logprobs.token_logprobs[place],
    });
  });
  // The last tokens' text may have come only now.
  for (let place = tokens.length - 1, stop = text.length; place >= 0; place -= 1) {
    const token = tokens[place];
    if (token.from === undefined) break;
    const piece = text.slice(token.from, stop).join("");
    if (piece === token.piece && place < tokens.length - 1 - (logprobs?.tokens.length ?? 0)) break;
    spell(token, piece);
    stop = token.from;
  }
}

function spell(token, piece) {
  token.piece = piece;
  token.element.textContent = piece;
  token.element.setAttribute("aria-label", spoken(token));
}

/** A token's text with everything to be seen: line breaks, control characters, lone bytes. */
function named(piece) {
  if (piece === "") return "part of a character";
  if (piece.startsWith("bytes:")) return `byte ${piece.slice(6).replaceAll("\\x", " ").trim()}`;
  const visible = piece.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return visible.replace(
    /\p{Cc}/gu,
    (found) => `U+${found.codePointAt(0).toString(16).padStart(4, "0")}`,
  );
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 10
    ? `${Math.round(share)} %`
    : share >= 0.1
      ? `${share.toFixed(1)} %`
      : "< 0.1 %";
};

function spoken({ piece, logprob, top }) {
  if (logprob === null) return `${named(piece)}, chosen by you`;
  const others = top.filter(([other]) => other !== piece).slice(0, 3);
  const said = others.map(([other, chance]) => `${named(other)} ${percent(chance)}`).join(", ");
  return `${named(piece)}, ${percent(logprob)}${said && `; else ${said}`}`;
}

function add(token) {
  const place = tokens.length;
  token.element = h("span.token", { id: `token-${place}`, role: "option" }, token.piece);
  token.element.setAttribute("aria-label", spoken(token));
  token.element.style.setProperty("--p", token.logprob === null ? 1 : Math.exp(token.logprob));
  token.element.classList.toggle("forced", token.logprob === null);
  if (token.from === undefined) text.push(...token.piece);
  tokens.push(token);
  $("tokens").append(token.element);
}

/** Begin anew with these tokens. */
function show(kept) {
  tokens = [];
  text = [];
  active = -1;
  $("tokens").replaceChildren();
  $("tokens").removeAttribute("aria-activedescendant");
  for (const { piece, logprob, top } of kept) add({ piece, logprob, top });
}

/** The answer becomes part of the text that the model goes on from. */
function takeIn() {
  field().value += text.join("");
  keepSetting("complete-prompt", field().value);
  show([]);
  say("");
  hideCard();
  refresh();
  field().focus();
  field().scrollTop = field().scrollHeight;
}

// The card of a token.

function startTokens() {
  const list = $("tokens");
  const at = (event) => tokens.findIndex((token) => token.element === event.target);
  list.addEventListener("pointerover", (event) => at(event) >= 0 && choose(at(event)));
  list.addEventListener("click", (event) => at(event) >= 0 && choose(at(event)));
  list.addEventListener("focus", () => tokens.length && choose(Math.max(active, 0)));
  list.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    const ends = { Home: 0, End: tokens.length - 1 };
    if (event.key in steps) choose(active + steps[event.key]);
    else if (event.key in ends) choose(ends[event.key]);
    else if (event.key === "Enter" || event.key === " ") $("card").querySelector("button")?.focus();
    else if (event.key === "Escape") hideCard();
    else return;
    event.preventDefault();
  });
  $("card").addEventListener("keydown", (event) => {
    if (event.key === "Escape") list.focus();
  });
  $("complete-output").addEventListener("pointerleave", () => {
    if (!$("complete-output").contains(document.activeElement)) hideCard();
  });
  $("complete-output").addEventListener("focusout", (event) => {
    if (!$("complete-output").contains(event.relatedTarget)) hideCard();
  });
}

function hideCard() {
  $("card").hidden = true;
  tokens[active]?.element.removeAttribute("aria-selected");
}

function choose(place) {
  if (place < 0 || place >= tokens.length) return;
  tokens[active]?.element.removeAttribute("aria-selected");
  active = place;
  const { element, piece, logprob, top } = tokens[place];
  element.setAttribute("aria-selected", "true");
  $("tokens").setAttribute("aria-activedescendant", element.id);
  element.scrollIntoView({ block: "nearest" });
  const card = $("card");
  card.replaceChildren(
    h(
      "p.card-head",
      {},
      h("code", {}, named(piece)),
      logprob === null ? " chosen by you" : ` ${percent(logprob)}`,
    ),
    h(
      "ul",
      {},
      top.map(([other, chance]) => alternative(place, other, chance)),
    ),
  );
  card.hidden = false;
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const frame = $("complete-output").getBoundingClientRect();
  const left = Math.min(box.left - frame.left, frame.width - card.offsetWidth - 8);
  card.style.left = `${Math.max(left, 0)}px`;
  card.style.top = `${box.bottom - frame.top + 6}px`;
}

/** One of the likeliest tokens in a place; pressing it goes on from there with that token. */
function alternative(place, other, chance) {
  const bar = h("span.chance");
  bar.style.width = `${100 * Math.exp(chance)}%`;
  const fragment = other.startsWith("bytes:"); // half a character cannot be written into a prompt
  return h(
    "li",
    {},
    h(
      "button.alternative",
      {
        type: "button",
        disabled: fragment || abort !== null,
        title: fragment ? false : "Go on from here with this token",
        onclick: () => run(tokens.slice(0, place), other),
      },
      bar,
      h("code", {}, named(other)),
      h("span.share", {}, percent(chance)),
    ),
  );
}
