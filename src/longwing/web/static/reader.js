// The document beside the conversation: its text, how far the model has read, what was quoted.
//
// The text lies in pieces of a few thousand characters that the browser lays out only when they are
// seen, so that a book costs no more than a page. Highlights are CSS highlights: ranges over the
// text, which stays as it is. The rail beside it is the whole document in little: it fills while the
// model reads, and has a mark where each quotation stands.

import { $, announce, count, h, iconButton } from "./dom.js";

const PIECE = 3000; // characters, or to the next line break
const NARROW = matchMedia("(max-width: 899px)");

export class Reader {
  #pieces = []; // {start, node}: each a text node and where it begins in the text
  #document = null;
  #from = null; // the button from which the reader was sent to a place

  constructor(root, { onClose }) {
    this.root = root;
    this.name = h("h2.reader-name");
    this.facts = h("p.help");
    this.meter = h("meter.fit", { "aria-label": "Share of the model's context", min: 0, max: 1 });
    this.text = h("div.reader-text", { tabindex: "0", role: "region", "aria-label": "Document" });
    this.read = h("div.rail-read");
    this.marks = h("div.rail-marks");
    this.toggle = h(
      "button.quiet.only-narrow",
      {
        type: "button",
        "aria-expanded": "false",
        onclick: () => this.expand(!this.root.classList.contains("open")),
      },
      "Show the text",
    );
    this.back = h(
      "button.main.back.only-narrow",
      { type: "button", hidden: true, onclick: () => this.#goBack() },
      "Back to the answer",
    );
    root.append(
      h(
        "div.bar",
        {},
        this.name,
        h(
          "div.row",
          {},
          this.toggle,
          iconButton("close", "Put this document away", onClose, { word: false }),
        ),
      ),
      h("div.reader-facts", {}, this.meter, this.facts),
      h(
        "div.reader-body",
        {},
        this.text,
        h("div.rail", { "aria-hidden": "true" }, this.read, this.marks),
      ),
      this.back,
    );
  }

  /** Show a document: {name, text, pageStarts}. */
  show(document_) {
    this.#document = document_;
    this.name.textContent = document_.name;
    this.#pieces = [];
    this.text.replaceChildren(...this.#cut(document_.text));
    this.text.scrollTop = 0;
    this.quotes([]);
    this.reading(0, 0);
    this.expand(false);
  }

  #cut(text) {
    const made = [];
    for (let start = 0; start < text.length;) {
      const line = text.indexOf("\n", start + PIECE);
      const stop = line < 0 ? text.length : line + 1;
      const node = document.createTextNode(text.slice(start, stop));
      this.#pieces.push({ start, node });
      made.push(h("div.piece", {}, node));
      start = stop;
    }
    return made;
  }

  /** Say how long the document is; `limit` tokens are what a prompt may have. */
  measure(tokens, limit, words) {
    const share = Number.isFinite(limit) && tokens !== null ? tokens / limit : 0;
    this.meter.value = Math.min(share, 1);
    this.meter.classList.toggle("over", share > 1);
    this.facts.classList.toggle("error", share > 1);
    this.facts.textContent = words;
  }

  /** Fill the rail: `done` of `total` tokens are read. */
  reading(done, total) {
    this.root.classList.toggle("is-reading", total > 0 && done < total);
    this.read.style.height = total ? `${(100 * done) / total}%` : "0";
  }

  /** Highlight what was quoted: a list of {start, stop}. */
  quotes(found) {
    if (!this.#document) return;
    const ranges = found.map(({ start, stop }) => this.#range(start, stop));
    if (CSS.highlights) CSS.highlights.set("quoted", new Highlight(...ranges));
    CSS.highlights?.delete("shown");
    const { length } = this.#document.text;
    this.marks.replaceChildren(
      ...found.map(({ start }) => {
        const mark = h("div.rail-mark");
        mark.style.top = `${(100 * start) / length}%`;
        return mark;
      }),
    );
  }

  /** Where a place is, for people: "page 12", or "at 37 %". */
  place(start) {
    const { text, pageStarts } = this.#document;
    if (!pageStarts) return `at ${Math.round((100 * start) / text.length)} %`;
    const next = pageStarts.findIndex((begin) => begin > start);
    return `page ${next < 0 ? pageStarts.length : next}`;
  }

  /** Bring a place into view; `from` is the button to go back to. */
  jump({ start, stop }, from) {
    this.expand(true);
    const range = this.#range(start, stop);
    if (CSS.highlights) CSS.highlights.set("shown", new Highlight(range));
    // Laid out first, or it would have no place yet.
    range.startContainer.parentElement.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => {
      const own = this.text.getBoundingClientRect();
      const [box = own] = range.getClientRects();
      this.text.scrollTop += box.top - own.top - own.height / 3;
      if (NARROW.matches) this.root.scrollIntoView({ block: "start" });
    });
    this.#from = from;
    this.back.hidden = !from;
    announce(`Shown in the document, ${this.place(start)}: ${range.toString().slice(0, 200)}`);
  }

  #goBack() {
    this.back.hidden = true;
    this.expand(false);
    this.#from?.scrollIntoView({ block: "center" });
    this.#from?.focus({ preventScroll: true });
  }

  /** On narrow screens the text is folded away until it is wanted. */
  expand(isOpen) {
    this.root.classList.toggle("open", isOpen);
    this.toggle.textContent = isOpen ? "Hide the text" : "Show the text";
    this.toggle.setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) this.back.hidden = true;
  }

  #range(start, stop) {
    const range = document.createRange();
    range.setStart(...this.#point(start));
    range.setEnd(...this.#point(stop));
    return range;
  }

  /** A place of the text as a text node and an offset. */
  #point(at) {
    let low = 0;
    let high = this.#pieces.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.#pieces[middle].start <= at) low = middle;
      else high = middle - 1;
    }
    const { start, node } = this.#pieces[low];
    return [node, Math.min(at - start, node.length)];
  }
}

/** How a document fits: words for its line of facts. */
export function fitWords(tokens, limit, characters) {
  if (tokens === null) return `${count(characters)} characters, counting tokens`;
  const size = `${count(tokens)} of ${count(limit)} tokens`;
  if (!Number.isFinite(limit)) return `${count(tokens)} tokens`;
  if (tokens >= limit) {
    return `${size}: ${count(tokens - limit + 1)} too many. Load the model with a longer context, or drop a shorter document.`;
  }
  return `${size} · ${count(characters)} characters`;
}

/** The element with the drop zone, shown while there is no document. */
export const dropZone = () => $("drop");
