// The Server tab: what the server is doing, drawn from /metrics every two seconds while it is seen.
//
// /metrics has totals; rates are their differences. A total that falls began anew, with another model
// or engine, and counts as no difference. What is drawn is also said in numbers above each chart.

import { call } from "./api.js";
import { $, count, h, seconds } from "./dom.js";

const PERIOD_MS = 2000;
const KEPT = 300; // points: ten minutes
const HEIGHT = 150;
const WINDOW_S = 60; // over which prompts are counted as asked lately

/** The charts: their series are functions of a `sample`, which `sampleOf` makes of two readings. */
const CHARTS = [
  {
    title: "Requests",
    unit: "",
    now: (s) => `${s.running} running, ${s.queued} queued`,
    series: [
      ["Running", "a", (s) => s.running],
      ["Queued", "b", (s) => s.queued],
    ],
  },
  {
    title: "Tokens per second",
    unit: "",
    now: (s) => `${rate(s.written)} written, ${rate(s.read)} read`,
    series: [
      ["Written", "a", (s) => s.written],
      ["Read", "b", (s) => s.read],
    ],
  },
  {
    title: "KV pages",
    unit: "",
    top: (s) => s.pages,
    now: (s) => `${count(s.used)} used, ${count(s.cached)} kept, of ${count(s.pages)}`,
    series: [
      ["Used", "a", (s) => s.used],
      ["Kept for their prefix", "b", (s) => s.used + s.cached],
    ],
  },
  {
    title: "Prompt tokens remembered",
    unit: "%",
    top: () => 100,
    now: (s) => `${share(s.hitsEver)} since the start`,
    series: [["Of prompts asked lately", "a", (s) => (s.hits === null ? null : 100 * s.hits)]],
  },
];

let uPlot = null;
let drawn = [];
let times = [];
let samples = [];
let before = null;
let timer = null;

const rate = (value) => (value === null ? "–" : value < 10 ? value.toFixed(1) : count(value));
const share = (value) => (value === null ? "–" : `${Math.round(100 * value)} %`);

/** The tab is shown, or hidden. */
export async function showServer(shown) {
  clearTimeout(timer);
  if (!shown) return;
  uPlot ??= (await import("/ui/vendor/uPlot.esm.js")).default;
  if (!drawn.length) {
    drawn = CHARTS.map(chart);
    addEventListener("resize", () => drawn.forEach((one) => one.fit()));
    addEventListener("longwing:theme", () => drawn.forEach((one) => one.make()));
  }
  drawn.forEach((one) => one.fit());
  await tick();
}

async function tick() {
  clearTimeout(timer);
  if ($("server").hidden) return;
  if (!document.hidden) {
    try {
      const text = await (await call("/metrics")).text();
      take(parsed(text));
      $("server-problem").textContent = "";
    } catch (error) {
      $("server-problem").textContent = error.message;
      before = null;
    }
  }
  timer = setTimeout(tick, PERIOD_MS);
}

/** Prometheus' text as a map from "name" or "name{labels}" to a number. */
export function parsed(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const space = line.lastIndexOf(" ");
    if (line && !line.startsWith("#"))
      found.set(line.slice(0, space), Number(line.slice(space + 1)));
  }
  return found;
}

function take(metrics) {
  const now = performance.now() / 1000;
  const sample = sampleOf(metrics, before, now);
  if (times.length && now - before?.now > 3 * (PERIOD_MS / 1000)) push(now - 1, null);
  push(now, sample);
  before = { metrics, now };
  for (const one of drawn) one.show(sample);
  tiles(sample, metrics);
}

function push(now, sample) {
  times.push(now);
  samples.push(sample);
  if (times.length > KEPT) {
    times.shift();
    samples.shift();
  }
}

/** What is shown of a reading, and of its difference to the one before. */
export function sampleOf(metrics, earlier, now) {
  const of = (name) => metrics.get(name) ?? 0;
  const total = (name) => of(`longwing_${name}_total`);
  const since = (value, name) => Math.max(0, value - (earlier?.metrics.get(name) ?? value));
  const grown = (name) => since(of(name), name);
  const elapsed = earlier ? now - earlier.now : null;
  const written = grown("longwing_generated_tokens_total");
  // Each token run in a step is one written or one read; drafts count twice, so not below zero.
  const read = Math.max(
    0,
    grown("longwing_step_tokens_sum") - written - grown("longwing_drafted_tokens_total"),
  );
  const per = (value) => (elapsed ? value / elapsed : null);
  const ratio = (part, whole) => (whole > 0 ? part / whole : null);
  const [asked, remembered] = [total("prompt_tokens"), total("cached_tokens")];
  const back =
    samples.findLast((one) => one && one.now < now - WINDOW_S) ?? samples.find((one) => one);
  const lately = back
    ? ratio(remembered - back.remembered, asked - back.asked)
    : ratio(remembered, asked);
  return {
    now,
    asked,
    remembered,
    running: of("longwing_running_sequences"),
    queued: of("longwing_waiting_sequences"),
    written: per(written),
    read: per(read),
    used: of("longwing_pages_used"),
    cached: of("longwing_pages_cached"),
    pages: of("longwing_pages"),
    // Where nothing was asked lately, what was true before still is.
    hits: lately ?? samples.findLast((one) => one)?.hits ?? null,
    hitsEver: ratio(remembered, asked),
    drafts: ratio(total("accepted_tokens"), total("drafted_tokens")),
  };
}

function tiles(sample, metrics) {
  const of = (name) => metrics.get(name) ?? 0;
  const failures = [...metrics].filter(([name]) => name.startsWith("tgi_request_failure{"));
  const mean = of("tgi_request_duration_sum") / of("tgi_request_duration_count");
  const shown = [
    ["Requests", count(of("tgi_request_count"))],
    ["Answered", count(of("tgi_request_success"))],
    ["Refused or broken off", count(failures.reduce((sum, [, value]) => sum + value, 0))],
    ["Mean time of an answer", Number.isFinite(mean) ? seconds(mean) : "–"],
    ["Tokens written", count(of("longwing_generated_tokens_total"))],
    ["Drafts that fitted", share(sample.drafts)],
  ];
  $("server-tiles").replaceChildren(
    ...shown.map(([name, value]) => h("div.tile", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}

/** One chart: `make` draws it in the colours of now, `fit` gives it its width, `show` its data. */
function chart({ title, unit, series, top, now }) {
  const words = h("p.chart-now", {}, "–");
  const frame = h("div.chart-frame", {
    role: "img",
    "aria-label": `${title}, the last ten minutes`,
  });
  $("charts").append(
    h(
      "section.card.chart",
      {},
      h("div.row.spread", {}, h("h3", {}, title), words),
      frame,
      legend(series),
    ),
  );
  let plot = null;
  // Seconds before now, so that the marks are round and the last one is now.
  const data = () => [
    times.map((time) => time - times.at(-1)),
    ...series.map(([, , value]) => samples.map((one) => (one ? value(one) : null))),
  ];
  const limit = () => top?.(samples.findLast((one) => one) ?? {}) || null;

  const make = () => {
    plot?.destroy();
    // A canvas needs colours as they come out in this theme, not as they are written.
    const colour = (name) => {
      words.style.color = `var(--${name})`;
      const found = getComputedStyle(words).color;
      words.style.color = "";
      return found;
    };
    const axis = {
      stroke: colour("muted"),
      grid: { stroke: colour("line"), width: 1 },
      ticks: { show: false },
      font: `12px ${getComputedStyle(words).fontFamily}`,
    };
    plot = new uPlot(
      {
        width: Math.max(frame.clientWidth, 200),
        height: HEIGHT,
        legend: { show: false },
        cursor: { show: false },
        padding: [8, 22, 0, 0],
        scales: {
          x: { time: false, range: (_, low) => [Math.min(low ?? 0, -60), 0] },
          y: { range: (_, low, high) => [0, limit() ?? Math.max(1, high * 1.1)] },
        },
        axes: [
          {
            ...axis,
            grid: { show: false },
            size: 24,
            values: (_, marks) => marks.map((mark) => ago(-mark)),
          },
          {
            ...axis,
            size: 48,
            values: (_, marks) =>
              marks.map(
                (mark) => `${mark >= 10_000 ? `${mark / 1000}k` : mark}${unit && ` ${unit}`}`,
              ),
          },
        ],
        series: [
          {},
          ...series.map(([label, name]) => ({
            label,
            stroke: colour(`chart-${name}`),
            fill: name === "a" ? colour("chart-fill") : undefined,
            width: 2,
            points: { show: false },
            dash: name === "b" ? [5, 4] : undefined,
            spanGaps: false,
          })),
        ],
      },
      data(),
      frame,
    );
  };

  return {
    make,
    fit: () =>
      plot ? plot.setSize({ width: Math.max(frame.clientWidth, 200), height: HEIGHT }) : make(),
    show: (sample) => {
      words.textContent = now(sample);
      plot?.setData(data());
    },
  };
}

const ago = (age) =>
  age < 1 ? "now" : age < 90 ? `${Math.round(age)} s` : `${Math.round(age / 60)} min`;

const legend = (series) =>
  h(
    "ul.legend",
    {},
    series.map(([label, name]) =>
      h("li", {}, h(`span.line.${name}`, { "aria-hidden": "true" }), label),
    ),
  );
