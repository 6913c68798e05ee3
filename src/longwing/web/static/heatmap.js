// Scores by length and depth, as a table whose fields are shaded: read out as well as seen.
//
// The shades are those of longwing's reports: orange for 0, yellow for a half, green for all. Each
// field has its number too, so that nothing is said by colour alone.

import { h } from "./dom.js";

const SHADES = [
  [194, 65, 12],
  [253, 230, 138],
  [21, 101, 92],
];

/** A length as reports write it: 4096 as "4k", 3000 as "3,000". */
export const lengthName = (size) =>
  size % 1024 === 0 ? `${size / 1024}k` : size.toLocaleString("en-US");

/**
 * The map of one task of an evaluation, as a table.
 *
 * `run` is what /ui/api/evaluations/{id} says. Fields that no case has reached yet are empty.
 */
export function heatMap(run, task) {
  const cells = run.cells.filter((cell) => cell.task === task);
  const tooLong = new Map(
    (run.too_long ?? []).filter((cell) => cell.task === task).map((cell) => [cell.size, cell]),
  );
  const sizes = sorted(run.lengths ?? [], [...cells.map((cell) => cell.size), ...tooLong.keys()]);
  const depths = sorted(
    run.depths ?? [],
    cells.map((cell) => cell.depth),
  );
  const at = new Map(cells.map((cell) => [`${cell.size}/${cell.depth}`, cell]));
  return h(
    "table.heat",
    {},
    h("caption", {}, task),
    h(
      "thead",
      {},
      h(
        "tr",
        {},
        h("th", { scope: "col" }, "Depth"),
        sizes.map((size) => h("th", { scope: "col" }, lengthName(size))),
      ),
    ),
    h(
      "tbody",
      {},
      depths.map((depth) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, `${Math.round(100 * depth)} %`),
          sizes.map((size) => field(at.get(`${size}/${depth}`), tooLong.has(size))),
        ),
      ),
    ),
  );
}

const sorted = (...lists) => [...new Set(lists.flat())].sort((a, b) => a - b);

function field(cell, isTooLong) {
  if (!cell && isTooLong) return h("td.too-long", { title: "longer than the context" }, "too long");
  if (!cell) return h("td", {}, h("span.visually-hidden", {}, "not yet"));
  const made = h(
    "td.scored",
    { title: `${cell.correct} of ${cell.cases}` },
    String(Math.round(100 * cell.score)),
  );
  const [colour, ink] = shade(cell.score);
  made.style.backgroundColor = colour;
  made.style.color = ink;
  return made;
}

/** The colour of a score from 0 to 1, and that of the number on it. */
function shade(score) {
  const [low, middle, high] = SHADES;
  const [from, to, part] = score < 0.5 ? [low, middle, 2 * score] : [middle, high, 2 * score - 1];
  const mixed = from.map((value, place) => Math.round(value + (to[place] - value) * part));
  const light = mixed.map((value) => (value / 255) ** 2.2);
  const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  return [`rgb(${mixed.join(" ")})`, luminance > 0.179 ? "#000" : "#fff"];
}
