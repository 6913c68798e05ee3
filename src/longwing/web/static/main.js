// The page: its tabs, its theme, and what is said of the model at the top. Each view is a module.

import { startAsk } from "./ask.js";
import { startChat } from "./chat.js";
import { startComplete } from "./complete.js";
import { $ } from "./dom.js";
import { showEvaluation, startEvaluation } from "./evaluation.js";
import { showModel, startModel } from "./model.js";
import { offerAdapters, offerTemplates, startParameters } from "./params.js";
import { showServer } from "./server.js";
import { onState, refreshState, theNames, theProblem } from "./session.js";
import { keepSetting } from "./store.js";

/** The tabs in order; those that show what changes are told when they are shown or hidden. */
const TABS = {
  ask: null,
  chat: null,
  complete: null,
  model: showModel,
  evaluation: showEvaluation,
  server: showServer,
};
const WITH_PARAMETERS = ["ask", "chat", "complete"];

const tab = (name) => $(`tab-${name}`);

function show(name) {
  for (const [other, told] of Object.entries(TABS)) {
    const isIt = other === name;
    const wasIt = !$(other).hidden;
    tab(other).setAttribute("aria-selected", String(isIt));
    tab(other).tabIndex = isIt ? 0 : -1;
    $(other).hidden = !isIt;
    if (isIt || wasIt) told?.(isIt);
  }
  document.body.dataset.tab = name;
  $("open-parameters").hidden = !WITH_PARAMETERS.includes(name);
  document.title = `${tab(name).textContent} · longwing`;
  keepSetting("tab", name);
}

function startTabs() {
  const names = Object.keys(TABS);
  const goTo = (name) => {
    if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
    show(name);
  };
  for (const name of names) tab(name).addEventListener("click", () => goTo(name));
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    const at = names.indexOf(document.body.dataset.tab);
    const last = names.length - 1;
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const name = names.at(next % names.length);
    goTo(name);
    tab(name).focus();
  });
  addEventListener("hashchange", () => named() && show(named()));
  const named = () => names.find((name) => `#${name}` === location.hash);
  show(named() ?? "ask");
  $("model-chip").addEventListener("click", () => goTo("model"));
}

const DARK = matchMedia("(prefers-color-scheme: dark)");

function startTheme() {
  const button = $("theme");
  const { dataset } = document.documentElement;
  const now = () => dataset.theme ?? (DARK.matches ? "dark" : "light");
  const label = () => {
    const other = now() === "dark" ? "light" : "dark";
    button.setAttribute("aria-label", `Change to ${other} colours`);
    button.title = `Change to ${other} colours`;
  };
  const changed = () => {
    label();
    dispatchEvent(new Event("longwing:theme"));
  };
  button.addEventListener("click", () => {
    const wanted = now() === "dark" ? "light" : "dark";
    const isBrowsers = wanted === (DARK.matches ? "dark" : "light");
    if (isBrowsers) delete dataset.theme;
    else dataset.theme = wanted;
    keepSetting("theme", isBrowsers ? null : wanted);
    changed();
  });
  DARK.addEventListener("change", changed);
  label();
}

const WORDS = { starting: "starting", draining: "finishing", dead: "no model" };

function showState(state) {
  const loading = state?.loading && ["draining", "loading"].includes(state.loading.phase);
  const status = loading ? "starting" : (state?.status ?? "gone");
  const chip = $("model-chip");
  chip.dataset.status = status;
  const name = loading ? `loading ${state.loading.name}` : state?.model?.name;
  const gone = theProblem()?.status === 401 ? "needs a key" : "no server";
  const words = !state
    ? gone
    : status === "ready" || loading
      ? name
      : `${name ?? ""} ${WORDS[status]}`;
  const short = words.includes("/") ? words.replace(/\S*\//, "") : words;
  $("model-chip-text").textContent = short;
  chip.title = state ? words : (theProblem()?.message ?? "");
  if (!state?.model) return;
  offerTemplates(state.model.templates ?? [], state.model.has_chat_template);
  if (status !== "ready") return;
  // A server that will not list its names still answers by its model's.
  if (state.model.name !== former) theNames().then(offerAdapters, () => {});
  former = state.model.name;
}

let former = null; // the model whose names were asked for

startTheme();
startParameters();
startAsk();
startChat();
startComplete();
startModel();
startEvaluation();
startTabs();
onState(showState);
refreshState();
