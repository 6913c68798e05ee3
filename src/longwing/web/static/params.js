// The Parameters panel: how answers are sampled, how long they may be, and which template is used.
//
// One set of parameters serves Ask, Chat and Complete. `sampling()` is what a request says of them;
// what is neutral is left out, so that the server's log and `x-longwing-without-effect` stay clean.

import { $, h, iconButton, toast } from "./dom.js";
import { keepSetting, setting } from "./store.js";

const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    low: 0,
    high: 2,
    step: 0.05,
    help: "0 always takes the likeliest token. Higher is freer.",
  },
  {
    name: "top_p",
    label: "Top-p",
    low: 0.01,
    high: 1,
    step: 0.01,
    draws: true,
    help: "Only the likeliest tokens that together hold this probability. 1: off.",
  },
  {
    name: "top_k",
    label: "Top-k",
    low: 0,
    high: 200,
    most: 2 ** 31 - 1,
    step: 1,
    draws: true,
    help: "Only the k likeliest tokens. 0: off.",
  },
  {
    name: "typical_p",
    label: "Typical-p",
    low: 0.01,
    high: 1,
    step: 0.01,
    draws: true,
    help: "Only the most typical tokens that hold this probability. 1: off.",
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    low: 1,
    high: 2,
    most: 100,
    step: 0.01,
    help: "Makes what was already said less likely. 1: off.",
  },
  {
    name: "max_tokens",
    label: "Max new tokens",
    low: 1,
    high: 4096,
    most: 2 ** 31 - 1,
    step: 1,
    help: "The answer ends here at the latest.",
  },
];

const NEUTRAL = {
  temperature: 0,
  top_p: 1,
  top_k: 0,
  typical_p: 1,
  repetition_penalty: 1,
  max_tokens: 512,
  seed: "",
  stop: "",
  template: "",
  system: "",
  adapter: "",
};

const PRESETS = {
  Exact: { temperature: 0, top_p: 1, top_k: 0, typical_p: 1, repetition_penalty: 1 },
  Balanced: { temperature: 0.7, top_p: 0.9, top_k: 0, typical_p: 1, repetition_penalty: 1.05 },
  Free: { temperature: 1, top_p: 0.95, top_k: 50, typical_p: 1, repetition_penalty: 1.05 },
};

/** The template of models that bring none; it needs no special tokens. */
const FALLBACK = "instruction";

const WIDE = matchMedia("(min-width: 1100px)");
const values = { ...NEUTRAL, ...setting("parameters", {}) };
const saved = setting("presets", {});
const inputs = {};

/** What is set, by name. */
export const parameters = () => ({ ...values });

/** The fields of a request's body; `room` is how many tokens the context leaves for the answer. */
export function sampling(room = Infinity) {
  const body = { temperature: values.temperature };
  if (values.adapter) body.model = values.adapter;
  body.max_tokens = Math.max(1, Math.min(values.max_tokens, room));
  for (const { name, draws } of FIELDS) {
    if (name in body || values[name] === NEUTRAL[name]) continue;
    if (!(draws && values.temperature === 0)) body[name] = values[name];
  }
  if (values.seed !== "" && values.temperature > 0) body.seed = Number(values.seed);
  const stops = stopStrings(values.stop);
  if (stops.length) body.stop = stops;
  return body;
}

/** One stop string a line; `\n` and `\t` stand for what cannot be typed into a line. */
export function stopStrings(text) {
  const typed = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
  return text
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replace(/\\[nt\\]/g, (found) => typed[found]));
}

/** Build the panel; the button of the page's head opens and closes it. */
export function startParameters() {
  const panel = $("parameters");
  panel.append(
    h(
      "div.sheet-head",
      {},
      h("h2", { id: "parameters-title" }, "Parameters"),
      iconButton("close", "Close the parameters", closeParameters),
    ),
    h(
      "div.sheet-body",
      {},
      presetRow(),
      FIELDS.map(numberField),
      seedField(),
      stopField(),
      adapterField(),
      templateField(),
      systemField(),
    ),
  );
  $("open-parameters").addEventListener("click", () => (panel.open ? closeParameters() : open()));
  panel.addEventListener("close", shown);
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && panel.open) closeParameters();
  });
  WIDE.addEventListener("change", closeParameters);
  refresh();
  if (WIDE.matches && setting("parameters-open", false)) panel.show();
  shown();
}

function open() {
  const panel = $("parameters");
  if (WIDE.matches) panel.show();
  else panel.showModal();
  keepSetting("parameters-open", true);
  shown();
}

function closeParameters() {
  if (!$("parameters").open) return;
  $("parameters").close();
  keepSetting("parameters-open", false);
  $("open-parameters").focus();
}

function shown() {
  const isOpen = $("parameters").open;
  $("open-parameters").setAttribute("aria-expanded", String(isOpen));
  document.body.classList.toggle("with-parameters", isOpen);
}

/** The templates that the loaded model can use; its own comes first. */
export function offerTemplates(templates, hasOwn) {
  const named = templates.filter((name) => name !== "default");
  const first = hasOwn ? "The model's own" : `It has none: ${FALLBACK}`;
  const select = inputs.template;
  select.replaceChildren(
    h("option", { value: "" }, first),
    ...named.map((name) => h("option", { value: name }, name)),
  );
  if (!named.includes(values.template)) values.template = "";
  fallback = hasOwn ? null : FALLBACK;
  refresh();
}

let fallback = null;

/** The template to ask for: null is the model's own. */
export const template = () => values.template || fallback;

/** The names that the server answers by: the model's, and those of its adapters. */
export function offerAdapters([model, ...adapters]) {
  inputs.adapter.replaceChildren(
    h("option", { value: "" }, `None: ${model}`),
    ...adapters.map((name) => h("option", { value: name }, name)),
  );
  if (!adapters.includes(values.adapter)) values.adapter = "";
  inputs.adapter.closest(".field").hidden = !adapters.length;
  refresh();
}

function set(name, value) {
  values[name] = value;
  keepSetting("parameters", values);
  refresh();
}

function refresh() {
  for (const { name, draws } of FIELDS) {
    const [field, slider] = inputs[name];
    if (document.activeElement !== field) field.value = values[name];
    slider.value = values[name];
    const idle = Boolean(draws && values.temperature === 0);
    field.closest(".field").classList.toggle("idle", idle);
  }
  for (const name of ["seed", "stop", "adapter", "template", "system"]) {
    if (document.activeElement !== inputs[name]) inputs[name].value = values[name];
  }
  inputs.seed.closest(".field").classList.toggle("idle", values.temperature === 0);
  $("idle-note").hidden = values.temperature !== 0;
  const fits = (preset) => Object.entries(preset).every(([name, value]) => values[name] === value);
  const all = { ...PRESETS, ...saved };
  inputs.preset.value = Object.keys(all).find((name) => fits(all[name])) ?? "";
  inputs.forget.hidden = !(inputs.preset.value in saved);
}

function presetRow() {
  const select = h("select", {
    id: "preset",
    onchange: () => {
      Object.assign(values, { ...PRESETS, ...saved }[select.value]);
      keepSetting("parameters", values);
      refresh();
    },
  });
  const name = h("input", { type: "text", id: "preset-name", maxlength: 40, autocomplete: "off" });
  const form = h(
    "form.row",
    {
      hidden: true,
      onsubmit: (event) => {
        event.preventDefault();
        if (savePreset(name.value.trim())) form.hidden = true;
      },
    },
    h("label.visually-hidden", { for: "preset-name" }, "Name of the preset"),
    h("div.grow", {}, name),
    h("button.main", { type: "submit" }, "Save"),
  );
  const ask = () => {
    form.hidden = !form.hidden;
    name.value = "";
    name.focus();
  };
  inputs.preset = select;
  inputs.forget = h("button.quiet", { type: "button", onclick: forgetPreset }, "Delete");
  offerPresets();
  return h(
    "div.field",
    {},
    h("label", { for: "preset" }, "Preset"),
    h(
      "div.row",
      {},
      select,
      h("button.quiet", { type: "button", onclick: ask }, "Save as…"),
      inputs.forget,
    ),
    form,
  );
}

function offerPresets() {
  inputs.preset.replaceChildren(
    h("option", { value: "", disabled: true }, "Own settings"),
    ...Object.keys({ ...PRESETS, ...saved }).map((name) => h("option", { value: name }, name)),
  );
}

/** Keep what is set under a name; false if it cannot have that name. */
function savePreset(name) {
  if (!name || name in PRESETS) {
    toast(name ? `${name} comes with longwing; choose another name` : "A preset needs a name");
    return false;
  }
  const { seed: _seed, adapter: _adapter, template: _template, system: _system, ...kept } = values;
  saved[name] = kept;
  keepSetting("presets", saved);
  offerPresets();
  refresh();
  return true;
}

function forgetPreset() {
  delete saved[inputs.preset.value];
  keepSetting("presets", saved);
  offerPresets();
  refresh();
}

function numberField({ name, label, low, high, most, step, help }) {
  const take = (event) => {
    const value = Number(event.target.value);
    const valid = event.target.value !== "" && value >= low && value <= (most ?? high);
    if (valid && (step < 1 || Number.isInteger(value))) set(name, value);
  };
  const field = h("input", {
    type: "number",
    id: `p-${name}`,
    min: low,
    max: most ?? high,
    step: step < 1 ? "any" : step,
    "aria-describedby": `p-${name}-help`,
    oninput: take,
    onblur: refresh,
  });
  const slider = h("input", {
    type: "range",
    min: low,
    max: high,
    step,
    "aria-label": `${label}, slider`,
    oninput: take,
  });
  inputs[name] = [field, slider];
  return h(
    "div.field",
    {},
    h("div.row.spread", {}, h("label", { for: `p-${name}` }, label), field),
    slider,
    h("p.help", { id: `p-${name}-help` }, help),
    name === "temperature" &&
      h(
        "p.help.note",
        { id: "idle-note" },
        "At 0 nothing is drawn: top-p, top-k, typical-p and seed have no effect.",
      ),
  );
}

function wordField(name, label, help, field) {
  field.id = `p-${name}`;
  field.setAttribute("aria-describedby", `p-${name}-help`);
  field.addEventListener("change", () => set(name, field.value));
  inputs[name] = field;
  return h(
    "div.field",
    {},
    h("label", { for: field.id }, label),
    field,
    h("p.help", { id: `p-${name}-help` }, help),
  );
}

const seedField = () =>
  wordField(
    "seed",
    "Seed",
    "The same seed gives the same answer. Empty: a new one each time.",
    h("input", { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 }),
  );

const stopField = () =>
  wordField(
    "stop",
    "Stop",
    "The answer ends before any of these; one a line, \\n is a line break.",
    h("textarea", { rows: 2, spellcheck: "false" }),
  );

function adapterField() {
  const field = wordField(
    "adapter",
    "Adapter",
    "What the model was tuned for; the server holds these beside it.",
    h("select"),
  );
  field.hidden = true;
  return field;
}

const templateField = () =>
  wordField(
    "template",
    "Prompt template",
    "How a conversation is written down for the model.",
    h("select"),
  );

const systemField = () =>
  wordField(
    "system",
    "System message",
    "Put before every conversation in Chat.",
    h("textarea", { rows: 3 }),
  );
