// The Model tab: what is loaded and how, what could be, and what can be fetched.
//
// Everything here asks routes that may need the admin key; api.js asks for it when they do. How a
// model is to be loaded, and whether it fits, is loadform.js.

import { get, post } from "./api.js";
import {
  $,
  announce,
  bytes,
  count,
  h,
  iconButton,
  progressBar,
  redraw,
  seconds,
  toast,
} from "./dom.js";
import { loadForm } from "./loadform.js";
import { onState, refreshState, theProblem, theState } from "./session.js";

let isOpen = false;
let former = ""; // what was loaded when the list was last drawn
let opened = null; // id of the model whose form is open

/** Set the tab up. */
export function startModel() {
  $("download-form").addEventListener("submit", (event) => {
    event.preventDefault();
    fetchModel($("download-name").value.trim());
  });
  $("models-refresh").addEventListener("click", () => listModels(true));
  onState(drawState);
}

/** The tab is shown, or hidden. */
export function showModel(shown) {
  isOpen = shown;
  if (!shown) return;
  drawState(theState());
  listModels();
  listDownloads();
}

// What is loaded.

function drawState(state) {
  if (!isOpen) return;
  const place = $("loaded");
  if (!state) {
    redraw(place, h("p.error", {}, theProblem()?.message));
    return;
  }
  redraw(place, loadingCard(state), state.model && loadedCard(state));
  const now = `${state.model?.id}/${state.status}/${state.loading?.phase}`;
  if (former && now !== former) listModels();
  former = now;
  if (state.downloads_running || hadRunning) listDownloads();
}

/** "ready", "loading"… as a person says it. */
const STATUS = {
  ready: "Loaded",
  starting: "Starting",
  draining: "Finishing its answers",
  dead: "Not loaded",
};

function loadedCard({ model, status }) {
  return h(
    "section.card",
    { "aria-label": "Loaded model" },
    h(
      "div.row.spread",
      {},
      h("h3.model-name", {}, model.name),
      h(`span.badge.${status}`, {}, STATUS[status] ?? status),
    ),
    facts([
      ["Weights", [weights(model), bytes(model.weight_bytes)]],
      ["Act-order", model.bits ? (model.act_order ? "yes" : "no") : null],
      ["Computed in", model.dtype],
      ["Device", [model.device, model.device_name]],
      ["Context", `${count(model.max_total_len)} tokens`],
      ["RoPE", [model.rope_method === "default" ? "as trained" : model.rope_method, rungs(model)]],
      [
        "KV cache",
        [
          `${bytes(model.kv_bytes)} in ${model.kv_dtype}`,
          `${count(model.num_pages)} pages of ${model.page_len} = ${count(model.num_pages * model.page_len)} tokens`,
        ],
      ],
      ["Prompt template", model.has_chat_template ? "the model's own" : "none of its own"],
    ]),
  );
}

/** A list of facts: pairs of a name and one or several texts; those without any are left out. */
export function facts(pairs) {
  const known = pairs
    .map(([name, said]) => [name, [said].flat().filter(Boolean).join(", ")])
    .filter(([, said]) => said);
  return h(
    "dl.facts",
    {},
    known.map(([name, said]) => h("div", {}, h("dt", {}, name), h("dd", {}, said))),
  );
}

function weights({ bits, group_size: group, quantization, dtype }) {
  if (!bits) return quantization && quantization !== "none" ? quantization : `dense, ${dtype}`;
  return `${bits}-bit GPTQ, ${group > 0 ? `group ${group}` : "no groups"}`;
}

function rungs({ rope_rungs: lengths, rope }) {
  if (rope) return rope;
  return lengths?.length > 1 ? `base changes at ${lengths.map(count).join(", ")}` : null;
}

function loadingCard({ loading, model }) {
  if (!loading) return null;
  const { phase, name, error } = loading;
  if (phase === "failed" || phase === "cancelled" || phase === "unloaded") {
    const said = {
      failed: `${name} could not be loaded`,
      cancelled: "Loading was cancelled",
      unloaded: "No model is loaded",
    };
    return h(
      "section.card.notice",
      { role: "status" },
      h("h3", {}, said[phase]),
      error && h("p", {}, error),
      model &&
        h(
          "button.main",
          { type: "button", onclick: () => load({ model: model.id, ...model.options }) },
          `Load ${model.name} again`,
        ),
    );
  }
  const bar = progressBar(`Loading ${name}`);
  bar.show(loading.total_bytes ? loading.done_bytes / loading.total_bytes : null);
  const said =
    phase === "draining"
      ? `The answers at work may finish first: ${loading.open_requests} left`
      : `${bytes(loading.done_bytes)} of ${bytes(loading.total_bytes)}`;
  return h(
    "section.card",
    { "aria-label": `Loading ${name}` },
    h(
      "div.row.spread",
      {},
      h("h3", {}, `Loading ${name}`),
      h("button.quiet", { type: "button", onclick: cancelLoad }, "Cancel"),
    ),
    bar,
    h("p.help", {}, said),
  );
}

/** Load a model; `body` is that of POST /ui/api/load. False if it was refused. */
async function load(body) {
  const refused = await tried(() => post("/ui/api/load", body));
  if (!refused) {
    opened = null;
    announce("Loading");
    scrollTo({ top: 0 });
  }
  await refreshState();
  return refused;
}

async function cancelLoad() {
  await tried(() => post("/ui/api/load/cancel", {}));
  await refreshState();
}

/** Do something; a refusal is said, and returned. */
async function tried(work) {
  try {
    await work();
    return "";
  } catch (error) {
    toast(error.message);
    return error.message;
  }
}

// What could be loaded.

async function listModels(anew = false) {
  const list = $("models");
  const problem = $("models-problem");
  try {
    const { models } = await get(`/ui/api/models${anew ? "?refresh=1" : ""}`);
    problem.textContent = models.length ? "" : "There are none here yet. Download one below.";
    const kept = list.querySelector("form.load-form");
    redraw(
      list,
      models.map((model) => modelEntry(model, kept)),
    );
  } catch (error) {
    problem.textContent = error.message;
    list.replaceChildren();
  }
}

function modelEntry(model, kept) {
  const { id, name, loadable } = model;
  const isIt = model.loaded;
  const about = loadable
    ? [
        model.architecture,
        model.parameters && parameterCount(model.parameters),
        weights(model),
        model.context && `${lengthWords(model.context)} context`,
        bytes(model.bytes),
      ]
    : [model.why_not, bytes(model.bytes ?? 0)];
  const formed = h("div.load-place");
  const open = (form) => {
    opened = id;
    formed.replaceChildren(form);
    button.setAttribute("aria-expanded", "true");
  };
  const close = () => {
    opened = null;
    formed.replaceChildren();
    button.setAttribute("aria-expanded", "false");
  };
  const word = isIt ? "Load otherwise" : "Load";
  const button = h(
    "button.quiet",
    {
      type: "button",
      "aria-expanded": "false",
      "aria-label": `${word}: ${name}`,
      onclick: () => (opened === id ? close() : (closeOthers(), open(loadForm(model, load)))),
    },
    word,
  );
  const entry = h(
    "li.model-entry",
    {},
    h(
      "div.row.spread",
      {},
      h(
        "div.grow",
        {},
        h("h3.model-name", {}, name, isIt && h("span.badge.ready", {}, "loaded")),
        h("p.help", {}, about.filter(Boolean).join(" · ")),
      ),
      loadable && button,
      model.resumable &&
        h("button.quiet", { type: "button", onclick: () => fetchModel(name) }, "Resume"),
    ),
    formed,
  );
  if (opened === id && loadable) open(kept ?? loadForm(model, load));
  return entry;
}

function closeOthers() {
  for (const form of document.querySelectorAll("form.load-form")) form.remove();
  for (const one of document.querySelectorAll("#models [aria-expanded]")) {
    one.setAttribute("aria-expanded", "false");
  }
}

const lengthWords = (length) => (length % 1024 ? count(length) : `${length / 1024}k`);

function parameterCount(number) {
  const [size, letter] = [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "K"],
    [1, ""],
  ].find(([least]) => number >= least);
  return `${(number / size).toFixed(size === 1e9 ? 1 : 0)} ${letter} parameters`;
}

// What can be fetched.

let hadRunning = false;

async function fetchModel(name) {
  if (!name) return;
  const refused = await tried(() => post("/ui/api/downloads", { name }));
  $("download-problem").textContent = refused;
  if (!refused) $("download-name").value = "";
  await refreshState();
  await listDownloads();
}

async function listDownloads() {
  try {
    const { downloads, offline } = await get("/ui/api/downloads");
    if (offline) $("download-problem").textContent = "This server is offline (HF_HUB_OFFLINE).";
    redraw($("downloads"), downloads.map(downloadEntry));
    const running = downloads.some((one) => one.state === "running");
    if (hadRunning && !running) listModels();
    hadRunning = running;
  } catch (error) {
    $("download-problem").textContent = error.message;
  }
}

function downloadEntry(one) {
  const { name, state, done_bytes: done, total_bytes: total } = one;
  const bar = progressBar(`Downloading ${name}`);
  bar.show(total ? done / total : null);
  const rate = one.bytes_per_s
    ? `${bytes(one.bytes_per_s)}/s, ${seconds((total - done) / one.bytes_per_s)} left`
    : "";
  const words = {
    running: total
      ? [`${bytes(done)} of ${bytes(total)}`, rate, one.file]
      : ["Asking for the list of files"],
    done: [`${bytes(total)} are here`, one.owner && `from ${one.owner}`],
    failed: [one.error],
    cancelled: [`Cancelled at ${bytes(done)}; what arrived is kept`],
  };
  const cancel = () =>
    tried(() => post("/ui/api/downloads/cancel", { name }))
      .then(listDownloads)
      .then(refreshState);
  return h(
    "li.model-entry",
    {},
    h(
      "div.row.spread",
      {},
      h("h3.model-name", {}, name),
      state === "running" && iconButton("close", `Cancel the download of ${name}`, cancel),
      (state === "failed" || state === "cancelled") &&
        h("button.quiet", { type: "button", onclick: () => fetchModel(name) }, "Resume"),
    ),
    state === "running" && bar,
    h(`p.help${state === "failed" ? ".error" : ""}`, {}, words[state].filter(Boolean).join(" · ")),
  );
}
