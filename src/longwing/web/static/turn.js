// One turn of a conversation on the page: a question, or an answer that is read for, grows, and ends.
//
// A turn is {role, text} and, for answers, {finish, usage, seconds, firstSeconds, model, error}. The
// line under an answer has one height from the beginning, so that nothing moves when its words change.

import { copy, count, h, icon, iconButton, progressBar, seconds } from "./dom.js";
import { Growing } from "./markdown.js";

/** A turn's element and what happens to it. `acts` are the talk's: edit, regenerate, goOn. */
export class TurnView {
  #growing = null;
  #waiting = null; // the frame in which a text that came will be shown

  constructor(turn, acts) {
    this.turn = turn;
    const isAnswer = turn.role === "assistant";
    this.body = h("div.text");
    this.status = h("p.status");
    this.bar = progressBar("Reading the prompt");
    this.bar.hidden = true;
    this.actions = h("div.actions");
    this.extra = h("div.extra");
    this.element = h(
      `li.turn.${isAnswer ? "answer" : "question"}`,
      {},
      h("h3.who", {}, isAnswer ? "Answer" : "You"),
      this.body,
      this.extra,
      h("div.foot", {}, isAnswer && this.bar, isAnswer && this.status, this.actions),
    );
    if (isAnswer) this.#growing = new Growing(this.body);
    else this.body.textContent = turn.text;
    this.#offer(acts);
    if (isAnswer && turn.finish) this.finish();
  }

  #offer({ edit, regenerate, goOn }) {
    const { turn } = this;
    const add = (...made) => this.actions.append(...made);
    if (turn.role === "user") {
      add(iconButton("edit", "Edit this question", () => edit(this)));
      add(iconButton("copy", "Copy the question", () => copy(turn.text)));
      return;
    }
    this.goOn = h("button.quiet", { type: "button", onclick: () => goOn(this) }, "Go on");
    this.again = iconButton("again", "Answer again", () => regenerate(this));
    this.copy = iconButton("copy", "Copy the answer", () => copy(turn.text));
    add(this.goOn, this.copy, this.again);
    this.actions.hidden = true;
  }

  /** The prompt is read so far. */
  reading(done, total) {
    this.bar.hidden = false;
    this.bar.show(total ? done / total : null);
    this.status.textContent = total
      ? `Reading ${count(done)} of ${count(total)} tokens`
      : "Waiting for the model";
  }

  /** The text so far; shown with the next frame. */
  grow(usage) {
    this.bar.hidden = true;
    this.status.textContent = remembered(usage) || "Writing";
    this.#waiting ??= requestAnimationFrame(() => {
      this.#waiting = null;
      this.#growing.show(this.turn.text);
      this.onshown?.();
    });
  }

  /** The answer is there, or will never be. */
  finish() {
    const { turn } = this;
    cancelAnimationFrame(this.#waiting);
    this.#growing.show(turn.text);
    this.#growing.finish();
    this.bar.hidden = true;
    this.status.replaceChildren(...facts(turn));
    this.status.classList.toggle("error", Boolean(turn.error));
    this.actions.hidden = false;
    this.goOn.hidden = turn.error || !turn.text || turn.finish === "stop";
    this.copy.hidden = !turn.text;
  }

  /** The text goes on, or begins anew. */
  resume() {
    this.actions.hidden = true;
    this.status.classList.remove("error");
    this.reading(0, 0);
    this.#growing.show(this.turn.text);
    this.extra.replaceChildren();
  }

  /** Only the last answer can go on or be given again. */
  last(isLast) {
    if (this.turn.role !== "assistant") return;
    this.again.hidden = !isLast;
    if (!isLast) this.goOn.hidden = true;
  }

  /** Put a field in the question's place; `done(text)` with what it was changed to, or null. */
  edit(done) {
    const field = h("textarea", { rows: 3, "aria-label": "Edit the question" });
    field.value = this.turn.text;
    const end = (text) => {
      form.replaceWith(this.body);
      this.actions.hidden = false;
      done(text);
    };
    const form = h(
      "form.edit",
      {
        onsubmit: (event) => {
          event.preventDefault();
          if (field.value.trim()) end(field.value.trim());
        },
        onkeydown: (event) => {
          if (event.key === "Escape") end(null);
          if (event.key === "Enter" && !event.shiftKey) form.requestSubmit();
          if (event.key === "Enter" && !event.shiftKey) event.preventDefault();
        },
      },
      field,
      h(
        "div.row.end",
        {},
        h("button.quiet", { type: "button", onclick: () => end(null) }, "Cancel"),
        h("button.main", { type: "submit" }, "Ask again"),
      ),
    );
    this.body.replaceWith(form);
    this.actions.hidden = true;
    field.focus();
  }
}

/** "12,480 of 12,560 tokens were remembered", or nothing if none were. */
export function remembered(usage) {
  if (!usage?.cached) return "";
  return `${count(usage.cached)} of ${count(usage.prompt)} tokens were remembered`;
}

const ENDS = { length: "ended at the limit of new tokens", stopped: "stopped by you" };

function facts(turn) {
  if (turn.error) return [icon("warning"), turn.error];
  const { usage, finish } = turn;
  const parts = [ENDS[finish]];
  if (usage) {
    parts.push(remembered(usage) || `${count(usage.prompt)} tokens read`);
    if (usage.generated) parts.push(...speed(turn));
  }
  return [parts.filter(Boolean).join(" · ")];
}

/** "75 written, 24/s" and "the first after 0.2 s"; reading does not count as writing. */
function speed({ usage, seconds: all, firstSeconds }) {
  const writing = all - (firstSeconds ?? 0);
  const rate = usage.generated > 1 && writing > 0.05 ? (usage.generated - 1) / writing : null;
  const fast = rate && `${rate < 10 ? rate.toFixed(1) : Math.round(rate)}/s`;
  const first = firstSeconds === null ? null : `the first after ${seconds(firstSeconds)}`;
  return [[`${count(usage.generated)} written`, fast].filter(Boolean).join(", "), first];
}
