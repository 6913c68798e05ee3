// The Evaluation tab: a retrieval run of the loaded model, its map of length × depth filling in, and
// earlier runs, alone or side by side.

import { get, post } from "./api.js";
import { $, announce, h, iconButton, progressBar, redraw, toast, when } from "./dom.js";
import { heatMap, lengthName } from "./heatmap.js";
import { onState, theSession, theState } from "./session.js";

const ABOUT = {
  passkey: "a number hidden in a text that repeats itself",
  lines: "the number that a named line of many holds",
  topics: "the first topic of a long conversation",
  facts: "four numbers in four places of a text",
};
const PAUSE_MS = 1000;
const NARROW = matchMedia("(max-width: 899px)");

let shownIds = []; // of the runs on the right
let timer = null;
let isOpen = false;

/** Set the tab up. */
export function startEvaluation() {
  $("eval-form").addEventListener("submit", (event) => {
    event.preventDefault();
    begin();
  });
  $("eval-report").addEventListener("click", report);
  onState(drawTasks);
}

/** The tab is shown, or hidden. */
export async function showEvaluation(shown) {
  isOpen = shown;
  clearTimeout(timer);
  if (!shown) return;
  drawTasks();
  const { running, runs } = (await listRuns()) ?? { runs: [] };
  if (!shownIds.length && runs.length) shownIds = [running ?? runs[0].id];
  await follow();
}

function drawTasks() {
  const place = $("eval-tasks");
  const tasks = theSession()?.options.tasks;
  if (!place.children.length && tasks) {
    place.append(
      ...tasks.map((task, number) => {
        const box = h("input", { type: "checkbox", name: "task", value: task, id: `task-${task}` });
        box.checked = number === tasks.indexOf("passkey");
        return h(
          "label.check",
          { for: box.id },
          box,
          h("span", {}, task, h("span.help", {}, ABOUT[task] ? `: ${ABOUT[task]}` : "")),
        );
      }),
    );
  }
  const state = theState();
  const limit = state?.model?.max_total_len;
  $("eval-limit").textContent = limit
    ? `${state.model.name} reads ${limit.toLocaleString("en-US")} tokens; longer cases are put down as too long.`
    : "";
  $("eval-start").disabled = Boolean(state && state.status !== "ready");
}

const list = (text) => text.split(/[\s,;]+/).filter(Boolean);

async function begin() {
  const tasks = [...document.querySelectorAll("#eval-tasks input:checked")].map((box) => box.value);
  const problem = $("eval-problem");
  problem.textContent = tasks.length ? "" : "Choose at least one task.";
  if (!tasks.length) return;
  const body = {
    tasks,
    lengths: list($("eval-lengths").value),
    depths: list($("eval-depths").value.replaceAll("%", "")).map((depth) => Number(depth) / 100),
    cases: Number($("eval-cases").value),
    seed: Number($("eval-seed").value) || 0,
  };
  try {
    const { id } = await post("/ui/api/evaluations", body);
    shownIds = [id];
    announce("The evaluation has begun");
    await listRuns();
    await follow();
    if (NARROW.matches) $("eval-shown").scrollIntoView({ block: "start" });
  } catch (error) {
    problem.textContent = error.message;
  }
}

/** Do something to a run, and show what came of it. */
async function act(id, what) {
  try {
    await post(`/ui/api/evaluations/${encodeURIComponent(id)}/${what}`, {});
  } catch (error) {
    toast(error.message);
  }
  if (what === "delete") shownIds = shownIds.filter((shown) => shown !== id);
  await listRuns();
  await follow();
}

// The list of runs.

async function listRuns() {
  try {
    const told = await get("/ui/api/evaluations");
    redraw($("eval-runs"), told.runs.map(runEntry));
    $("eval-none").hidden = told.runs.length > 0;
    return told;
  } catch (error) {
    $("eval-problem").textContent = error.message;
    return null;
  }
}

/** A run that has just begun has no name yet: it is of what is loaded. */
const nameOf = (run) => run.name || theState()?.model?.name || "?";

const STATES = { running: "running", done: "", stopped: "stopped", failed: "failed" };
const percent = (share) =>
  share === null || share === undefined ? null : `${Math.round(100 * share)} %`;

function runEntry(run) {
  const name = `${nameOf(run)}: ${run.tasks.join(", ")}`;
  const box = h("input", {
    type: "checkbox",
    id: `run-${run.id}`,
    onchange: () => {
      const others = shownIds.filter((id) => id !== run.id);
      shownIds = box.checked ? [...others, run.id] : others;
      follow();
    },
  });
  box.checked = shownIds.includes(run.id);
  const about = [
    run.begun && when(run.begun),
    run.lengths?.map(lengthName).join(", "),
    percent(run.accuracy),
    `${run.cases_done} cases`,
    STATES[run.state],
    run.error,
  ];
  return h(
    "li.run-entry",
    {},
    h(
      "label.check.grow",
      { for: box.id },
      box,
      h("span", {}, name, h("span.help", {}, about.filter(Boolean).join(" · "))),
    ),
    run.state === "running"
      ? h("button.quiet", { type: "button", onclick: () => act(run.id, "cancel") }, "Stop")
      : [
          run.state === "stopped" || run.state === "failed"
            ? h("button.quiet", { type: "button", onclick: () => act(run.id, "resume") }, "Go on")
            : null,
          iconButton("delete", `Delete the run ${name}`, () => act(run.id, "delete")),
        ],
  );
}

// What is shown of the chosen runs.

async function follow() {
  clearTimeout(timer);
  const ids = [...shownIds];
  const runs = [];
  for (const id of ids) {
    try {
      runs.push(await get(`/ui/api/evaluations/${encodeURIComponent(id)}`));
    } catch (error) {
      toast(error.message);
      shownIds = shownIds.filter((shown) => shown !== id);
    }
  }
  if (ids.join() !== shownIds.join() && ids.length === runs.length) return; // another choice meanwhile
  draw(runs);
  for (const box of document.querySelectorAll("#eval-runs input")) {
    box.checked = shownIds.includes(box.id.replace("run-", ""));
  }
  if (!isOpen || !runs.some((run) => run.state === "running")) return;
  timer = setTimeout(async () => {
    await listRuns();
    await follow();
  }, PAUSE_MS);
}

function draw(runs) {
  $("eval-report").hidden = runs.length === 0;
  $("eval-report").textContent =
    runs.length > 1 ? `Full report of these ${runs.length}` : "Full report";
  $("eval-hint").hidden = runs.length > 0;
  redraw(
    $("eval-shown"),
    runs.map((run) => runCard(run, runs.length > 1)),
    runs.length > 1 && comparison(runs),
  );
}

function runCard(run, isOneOfSeveral) {
  const bar = progressBar(`Cases of ${nameOf(run)}`);
  if (run.cases_total) bar.show(run.cases_done / run.cases_total);
  const said =
    run.state === "running"
      ? `${run.cases_done} of ${run.cases_total ?? "?"} cases`
      : [percent(run.accuracy), `${run.cases_done} cases`].filter(Boolean).join(" of ");
  return h(
    "section.card.run",
    { "aria-label": `${nameOf(run)}, ${run.tasks.join(", ")}` },
    h("div.row.spread", {}, h("h3", {}, nameOf(run)), h("span.help", {}, said)),
    run.state === "running" && bar,
    run.error && h("p.error", {}, run.error),
    h(
      "div.heats",
      {},
      run.tasks.map((task) =>
        h(
          "div.heat-frame",
          { tabindex: "0", role: "region", "aria-label": `Map of ${task}` },
          heatMap(run, task),
        ),
      ),
    ),
    h("p.help", {}, "Length across, depth of what was asked for downwards; score in %."),
    !isOneOfSeveral && run.rows.length > 0 && accuracyTable(run.rows),
    run.state === "running" && run.latest && latest(run.latest),
  );
}

function latest({ task, size, depth, expected, answer, correct }) {
  const where = depth === null ? "" : `, depth ${Math.round(100 * depth)} %`;
  return h(
    "p.help.latest",
    {},
    `${task}, ${lengthName(size)}${where}: ${correct ? "right" : "wrong"}. Wanted ${[expected].flat().join(", ")}, got “${answer.slice(0, 80)}”`,
  );
}

function accuracyTable(rows) {
  return h(
    "table.plain",
    {},
    h("caption.visually-hidden", {}, "Accuracy by length"),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        ["Task", "Length", "Cases", "Right", "95 % interval"].map((name) =>
          h("th", { scope: "col" }, name),
        ),
      ),
    ),
    h(
      "tbody",
      {},
      rows.map((row) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, row.task),
          h("td", {}, row.length ? lengthName(row.length) : "all"),
          h("td", {}, String(row.cases)),
          h("td", {}, percent(row.accuracy) ?? "–"),
          h(
            "td",
            {},
            row.low === null || row.low === undefined
              ? "–"
              : `${percent(row.low)} to ${percent(row.high)}`,
          ),
        ),
      ),
    ),
  );
}

/** Accuracy of several runs, one column each. */
function comparison(runs) {
  const key = (row) => `${row.task} ${row.length ? lengthName(row.length) : ""}`;
  const keys = [...new Set(runs.flatMap((run) => run.rows.map(key)))];
  return h(
    "section.card",
    { "aria-label": "Side by side" },
    h("h3", {}, "Side by side"),
    h(
      "table.plain",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("th", { scope: "col" }, "Right"),
          runs.map((run) => h("th", { scope: "col" }, nameOf(run))),
        ),
      ),
      h(
        "tbody",
        {},
        keys.map((name) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, name),
            runs.map((run) => {
              const row = run.rows.find((one) => key(one) === name);
              return h("td", {}, row ? `${percent(row.accuracy) ?? "–"} of ${row.cases}` : "–");
            }),
          ),
        ),
      ),
    ),
  );
}

async function report() {
  const page = window.open("", "_blank");
  try {
    const { url } = await post("/ui/api/reports", { runs: shownIds });
    if (page) page.location = url;
    else location.assign(url);
  } catch (error) {
    page?.close();
    toast(error.message);
  }
}
