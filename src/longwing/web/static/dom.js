// Making elements, saying things aloud, copying and saving: what every view does with the page.
//
// Text reaches the page through `textContent` alone; only markdown.js ever parses HTML.

/**
 * An element: `h("button.quiet", {type: "button", onclick: go}, "Go")`.
 *
 * Attributes whose name begins with "on" are listeners; true is an empty attribute; false, null and
 * undefined leave one out. Children are nodes or texts; false, null and undefined are skipped.
 */
export function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined)
      element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== false && child != null));
  return element;
}

/** The element with this id. */
export const $ = (id) => document.getElementById(id);

/**
 * Replace what an element holds, and leave the focus where it was: on the same element if it is still
 * there, else on the one with the same label.
 */
export function redraw(place, ...children) {
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  place.replaceChildren(...children.flat().filter(Boolean));
  if (!focused) return;
  const label = labelOf(focused);
  const same = focused.isConnected
    ? focused
    : [...place.querySelectorAll("button, input, summary")].find((one) => labelOf(one) === label);
  same?.focus({ preventScroll: true });
}

const labelOf = (element) => element.getAttribute("aria-label") ?? element.textContent;

const SVG = "http://www.w3.org/2000/svg";

/** One of the icons drawn in index.html, as a decoration: its button carries the label. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A small button that is an icon, or an icon and a word. */
export function iconButton(name, label, onclick, { word = false } = {}) {
  const attributes = { type: "button", onclick };
  if (!word) Object.assign(attributes, { "aria-label": label, title: label });
  return h(word ? "button.quiet" : "button.quiet.round", attributes, icon(name), word && label);
}

/** Have a screen reader say this once it has finished what it is saying. */
export function announce(text) {
  const region = $("announcer");
  // The same words twice are no change, and would not be said again.
  region.textContent = region.textContent === text ? `${text}\u00a0` : text;
}

/** A line at the foot of the page that goes away by itself; also said aloud. */
export function toast(text) {
  const line = $("toast");
  line.textContent = text;
  line.hidden = false;
  announce(text);
  clearTimeout(line.timer);
  line.timer = setTimeout(() => (line.hidden = true), 4000);
}

/** Copy a text; also where the page is served over plain HTTP, which has no clipboard. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea.visually-hidden", { "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}

/** Have the browser save a text as a file. */
export function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** 12480 as "12,480". */
export const count = (value) => Math.round(value).toLocaleString("en-US");

/** Bytes as "5.2 GiB", as longwing's command line writes them. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) {
    value /= 1024;
    place += 1;
  }
  return `${value.toFixed(place && value < 100 ? 1 : 0)} ${units[place]}`;
}

/** Seconds as "0.8 s", "12 s" or "3 min 20 s". */
export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** When something was, for a list: the time of today, else the date. */
export function when(time) {
  const then = new Date(time);
  return then.toDateString() === new Date().toDateString()
    ? then.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
    : then.toLocaleDateString([], { year: "numeric", month: "short", day: "numeric" });
}

/** A horizontal bar of progress, filled to `share` of 1; null is "some time yet". */
export function progressBar(label) {
  const bar = h("progress", { "aria-label": label, max: 1 });
  bar.show = (share) => (share === null ? bar.removeAttribute("value") : (bar.value = share));
  return bar;
}
