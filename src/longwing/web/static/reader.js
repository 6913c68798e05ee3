// The document beside the conversation: its text, how far the model has read, what was quoted.
//
// The text lies in pieces of a few thousand characters that the browser lays out only when they are
// seen, so that a book costs no more than a page. Highlights are CSS highlights: ranges over the
// text, which stays as it is. The rail beside it is the whole document in little: it fills while the
// model reads, and has a mark where each quotation stands.

import { announce, count, h, icon, iconButton } from "./dom.js";

const PIECE = 3000; // characters, or to the next line break
const NARROW = matchMedia("(max-width: 899px)");

export class Reader {
  #pieces = []; // {start, node}: each a text node and where it begins in the text
  #document = null;
  #from = null; // the button from which the reader was sent to a place

  constructor(root, { onClose }) {
    this.root = root;
    this.name = h("h2.reader-name");
    this.facts = h("p.help.facts-line");
    this.notes = h("p.help");
    this.problem = h("p.error");
    this.close = iconButton("close", "", onClose);
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
        h("div.row", {}, this.toggle, this.close),
      ),
      h("div.reader-facts", {}, this.meter, this.facts, this.notes, this.problem),
      h(
        "div.reader-body",
        {},
        this.text,
        h("div.rail", { "aria-hidden": "true" }, this.read, this.marks),
      ),
      this.back,
    );
  }

  /** Show a document: {name, text, pageStarts, warnings}; null: none. */
  show(document_) {
    this.#document = document_;
    this.#pieces = [];
    this.text.replaceChildren(...this.#cut(document_?.text ?? ""));
    this.text.scrollTop = 0;
    this.notes.textContent = (document_?.warnings ?? []).join(" · ");
    this.quotes([]);
    this.reading(0, 0);
    this.expand(false);
    this.loading(null);
  }

  /** Another file of this name is being read: the head tells of it, the text stays. null: no more. */
  loading(name) {
    this.name.textContent = name ?? this.#document?.name ?? "";
    this.root.classList.toggle("loading", name !== null);
    this.root.setAttribute("aria-busy", String(name !== null));
    const label = name === null ? "Put this document away" : "Stop reading this file";
    this.close.setAttribute("aria-label", label);
    this.close.title = label;
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

  /** Say how long the document is, or is so far; `limit` tokens are what a prompt may have. */
  measure(tokens, limit, words) {
    const share = Number.isFinite(limit) && tokens !== null ? tokens / limit : 0;
    const isOver = share >= 1;
    this.meter.value = Math.min(share, 1);
    this.meter.classList.toggle("over", isOver);
    this.facts.classList.toggle("error", isOver);
    this.facts.replaceChildren(...(isOver ? [icon("warning"), words] : [words]));
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
  if (tokens === null) return `${count(characters)} characters, not counted yet`;
  const more = tokens >= limit ? tooMany(tokens, limit) : `${count(characters)} characters`;
  return `${ofLimit(tokens, limit)} · ${more}`;
}

/** The same while it is read: {tokens, share, page, pages}. */
export function soFarWords({ tokens, share, page, pages }, limit) {
  const place = pages ? `page ${page} of ${pages}` : `${Math.round(100 * share)} %`;
  const more = tokens >= limit ? `${tooMany(tokens, limit)} already · ` : "";
  return `${ofLimit(tokens, limit)} · ${more}reading, ${place}`;
}

const ofLimit = (tokens, limit) =>
  Number.isFinite(limit) ? `${count(tokens)} of ${count(limit)} tokens` : `${count(tokens)} tokens`;

const tooMany = (tokens, limit) => `${count(tokens - limit + 1)} too many`;
