// Markdown from a model, shown safely, block by block while it grows.
//
// Three walls, each enough by itself: HTML in the Markdown is shown as text, what marked makes passes
// DOMPurify with a short list of tags, and the page's content security policy loads nothing from
// elsewhere and runs no inline script. Pictures are shown as links: a picture's address would tell
// whoever owns it that, and what, was answered.

import { copy, h, icon } from "./dom.js";
import { Marked } from "/ui/vendor/marked.esm.js";
import DOMPurify from "/ui/vendor/purify.es.mjs";

const escape = (text) => text.replace(/[&<>"']/g, (found) => `&#${found.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const purify = DOMPurify(window);
const ALLOWED = {
  ALLOWED_TAGS: [
    "a",
    "b",
    "blockquote",
    "br",
    "code",
    "del",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "i",
    "li",
    "ol",
    "p",
    "pre",
    "strong",
    "sub",
    "sup",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
  ],
  ALLOWED_ATTR: ["href", "start", "align", "title"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  if (!node.hasAttribute("href")) return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

/**
 * Shows one growing text in an element.
 *
 * A block that has not changed keeps its elements: what is selected in it stays selected, and the
 * page does not move.
 */
export class Growing {
  #blocks = [];

  constructor(element) {
    this.element = element;
    element.classList.add("markdown");
  }

  /** Show the text as it is now. */
  show(text) {
    const tokens = marked
      .lexer(text)
      .filter((token) => token.type !== "space" && token.type !== "def");
    const same = tokens.findIndex((token, place) => this.#blocks[place]?.raw !== token.raw);
    const first = same < 0 ? tokens.length : same;
    for (const old of this.#blocks.splice(first)) old.element.remove();
    for (const token of tokens.slice(first)) {
      const element = h("div.block", {}, sanitised(token));
      this.#blocks.push({ raw: token.raw, element });
      this.element.append(element);
    }
  }

  /** The text is complete: give code its copy buttons, and what scrolls a place for the keyboard. */
  finish() {
    for (const pre of this.element.querySelectorAll("pre")) {
      pre.tabIndex = 0;
      const button = h(
        "button.quiet.round.copy-code",
        {
          type: "button",
          "aria-label": "Copy this code",
          title: "Copy",
          onclick: () => copy(pre.querySelector("code")?.textContent ?? pre.textContent),
        },
        icon("copy"),
      );
      pre.parentElement.append(button);
    }
    for (const table of this.element.querySelectorAll("table")) {
      table.parentElement.tabIndex = 0;
    }
  }
}

function sanitised(token) {
  return purify.sanitize(marked.parser([token]), ALLOWED);
}
