// How a model is to be loaded, and what that takes: a form whose plan of memory follows each change.

import { post } from "./api.js";
import { bytes, count, h } from "./dom.js";
import { theSession } from "./session.js";

const PATIENCE_MS = 350; // after a change, before the plan is asked for

const SHOWN = {
  default: "as trained",
  auto: "automatic",
}; // what some options are called here

/**
 * The form of one model of the list; `load(body)` begins, and gives a refusal's sentence or "".
 */
export function loadForm(model, load) {
  const { options } = theSession();
  const plan = h("div.plan", { "aria-live": "polite" });
  const problem = h("p.error", { role: "alert" });
  const fields = {
    context: text("Context, tokens", "as long as fits", "24576 or 24k"),
    rope_method: choice("RoPE method", ["", ...options.rope_method], "the model's own"),
    rope_factor: text("RoPE factor", "the model's own", "such as 4", "decimal"),
    kv_dtype: choice("KV cache in", options.kv_dtype),
    dtype: choice("Computed in", options.dtype),
    device: choice("Device", options.device),
    memory: text("Memory at most", "what is free", "such as 24GiB"),
    card: choice("Plan for", ["", ...Object.keys(options.cards ?? {})], "this machine"),
  };
  let timer = null;
  let asked = 0;

  const body = () => {
    const given = { model: model.id };
    for (const [name, field] of Object.entries(fields)) {
      const value = field.input.value.trim();
      if (value && value !== "auto") given[name] = name === "rope_factor" ? Number(value) : value;
    }
    return given;
  };

  /** Ask for the plan of what is chosen now, and show it unless something else was chosen since. */
  const draw = async () => {
    const number = (asked += 1);
    const { device: _device, ...planned } = body();
    // For a card that is elsewhere one can only plan.
    button.disabled = Boolean(planned.card);
    if (planned.card) delete planned.memory;
    try {
      const told = await post("/ui/api/plan", planned);
      if (number !== asked) return;
      plan.replaceChildren(...planView(told));
    } catch (error) {
      if (number === asked) plan.replaceChildren(h("p.error", {}, error.message));
    }
  };

  const form = h("form.load-form", {
    "aria-label": `How to load ${model.name}`,
    oninput: () => {
      clearTimeout(timer);
      timer = setTimeout(draw, PATIENCE_MS);
    },
    onsubmit: async (event) => {
      event.preventDefault();
      button.disabled = true;
      problem.textContent = await load(body());
      button.disabled = false;
    },
  });
  const button = h("button.main", { type: "submit" }, "Load this model");
  form.append(
    h(
      "div.load-fields",
      {},
      Object.values(fields).map((field) => field.element),
    ),
    plan,
    h("div.row.end", {}, problem, button),
  );
  draw();
  return form;
}

let number = 0;

function labelled(label, input) {
  number += 1;
  input.id = `load-${number}`;
  return { input, element: h("div.field", {}, h("label", { for: input.id }, label), input) };
}

const text = (label, placeholder, title, inputmode = "text") =>
  labelled(label, h("input", { type: "text", placeholder, title, inputmode, autocomplete: "off" }));

function choice(label, values, empty) {
  const options = values.map((value) =>
    h("option", { value }, (value ? SHOWN[value] : empty) ?? value),
  );
  return labelled(label, h("select", {}, options));
}

/** A plan as a bar of what fills the memory, a sentence, and the table behind it. */
export function planView(plan) {
  const parts = [
    ["weights", "Weights", plan.weight_bytes],
    ["kv", `KV cache of ${count(plan.context)} tokens in ${plan.kv_dtype}`, plan.kv_bytes],
    ["work", "Workspace", plan.workspace_bytes],
  ];
  const whole = Math.max(plan.memory_bytes ?? 0, plan.peak_bytes);
  const bar = h(
    "div.plan-bar",
    { "aria-hidden": "true" },
    parts.map(([name, , size]) => {
      const part = h(`div.plan-part.${name}`);
      part.style.width = `${(100 * size) / whole}%`;
      return part;
    }),
  );
  return [
    h(`p.plan-verdict${plan.fits === false ? ".error" : ""}`, {}, verdict(plan)),
    bar,
    h(
      "ul.plan-legend",
      {},
      parts.map(([name, label, size]) =>
        h("li", {}, h(`span.dot.${name}`, { "aria-hidden": "true" }), `${label}: ${bytes(size)}`),
      ),
    ),
    plan.beyond_claim &&
      h(
        "p.help.note",
        {},
        `The model's settings claim ${count(plan.claimed_context)} tokens; beyond that its answers get worse unless RoPE is scaled.`,
      ),
    h("details.rows", {}, h("summary", {}, "The whole plan"), table(plan.rows)),
  ].filter(Boolean);
}

function verdict(plan) {
  const where = plan.memory_bytes ? ` of ${bytes(plan.memory_bytes)} (${plan.memory_name})` : "";
  const takes = `Takes ${bytes(plan.peak_bytes)}${where}.`;
  const longest = plan.longest_context
    ? ` Longest context: ${count(plan.longest_context)} tokens.`
    : "";
  if (plan.fits === false)
    return `Does not fit: takes ${bytes(plan.peak_bytes)}${where}.${longest}`;
  return takes + longest;
}

const table = (rows) =>
  h(
    "table.plain",
    {},
    h(
      "tbody",
      {},
      rows.map(([what, much, remark]) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, what),
          h("td", {}, much),
          h("td.help", {}, remark ?? ""),
        ),
      ),
    ),
  );
