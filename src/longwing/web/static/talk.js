// A conversation: its turns, the field that asks, and what can be done with them. Ask and Chat are
// each a Talk; they differ in what a prompt is made of.

import { answer } from "./answer.js";
import { $, announce, h, icon, iconButton, toast } from "./dom.js";
import { exportMenu, openHistory } from "./history.js";
import { theState } from "./session.js";
import { keep, newId } from "./store.js";
import { TurnView } from "./turn.js";

const TOUCH = matchMedia("(pointer: coarse)"); // whose keyboards have no Shift and Enter
const NEAR = 80; // pixels from the end within which the view follows what is written

/**
 * A conversation inside `root`.
 *
 * `ways` are what Ask and Chat each do in their way: `kind`; `placeholder` and `verb` of the field;
 * `messages(turns)` for the prompt; `whyNot()` says why nothing can be asked now, or "";
 * `onReading(done, total)`; `onAnswer(view)` for each complete answer that is shown; `onOpen` and
 * `onNew` when another conversation takes the place; `toExport(conversation)`.
 */
export class Talk {
  #abort = null;
  #views = [];
  #follows = true;

  constructor(root, ways) {
    this.ways = ways;
    this.title = h("h2.talk-title");
    this.list = h("ol.turns", { "aria-label": "Conversation", tabindex: "-1" });
    this.empty = h("p.empty", {}, ways.hint);
    this.scroll = h(
      "div.talk-scroll",
      { tabindex: "0", role: "region", "aria-label": "Conversation" },
      this.empty,
      this.list,
    );
    this.#composer();
    root.append(
      h(
        "div.bar",
        {},
        this.title,
        h(
          "div.row",
          {},
          iconButton("new", "New", () => this.begin(), { word: true }),
          iconButton("history", "History", () => openHistory(this), { word: true }),
          exportMenu(() => ways.toExport(this.conversation)),
        ),
      ),
      this.scroll,
      this.form,
    );
    this.scroll.addEventListener("scroll", () => this.#noteScroll());
    addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    this.begin();
  }

  #composer() {
    const { placeholder, verb } = this.ways;
    this.field = h("textarea", { rows: 1, placeholder, "aria-label": placeholder });
    this.send = h("button.main", { type: "submit" }, verb);
    this.stop = h(
      "button.main.stop",
      { type: "button", hidden: true, onclick: () => this.#abort?.abort() },
      icon("stop"),
      "Stop",
    );
    this.why = h("p.help.why", { id: `${this.ways.kind}-why` });
    this.field.setAttribute("aria-describedby", this.why.id);
    this.form = h(
      "form.composer",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.ask(this.field.value.trim());
        },
      },
      h("div.composer-row", {}, this.field, this.send, this.stop),
      this.why,
    );
    this.field.addEventListener("input", () => this.#fit());
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || TOUCH.matches) return;
      event.preventDefault();
      this.form.requestSubmit();
    });
  }

  /** Whether an answer is on its way. */
  get busy() {
    return this.#abort !== null;
  }

  /** A new, empty conversation. */
  begin() {
    this.halt();
    const { kind } = this.ways;
    this.conversation = { id: newId(), kind, title: "", began: Date.now(), changed: 0, turns: [] };
    this.ways.onNew?.();
    this.#draw();
    this.field.focus({ preventScroll: true });
  }

  /** Show a remembered conversation. */
  async open(conversation) {
    this.halt();
    this.conversation = conversation;
    await this.ways.onOpen?.(conversation);
    this.#draw();
    this.#toEnd();
  }

  #draw() {
    this.list.replaceChildren();
    this.#views = [];
    for (const turn of this.conversation.turns) this.#add(turn);
    this.refresh();
    for (const view of this.#views) if (view.turn.finish) this.ways.onAnswer?.(view);
  }

  #add(turn) {
    const view = new TurnView(turn, {
      edit: (one) => this.#edit(one),
      regenerate: (one) => this.#again(one),
      goOn: (one) => this.#answer(one, true),
    });
    view.onshown = () => this.#follow();
    this.#views.push(view);
    this.list.append(view.element);
    return view;
  }

  /** Show what can be done now. */
  refresh() {
    const why = this.ways.whyNot();
    this.why.textContent = why;
    this.send.disabled = Boolean(why);
    this.send.hidden = this.busy;
    this.stop.hidden = !this.busy;
    this.empty.hidden = this.conversation.turns.length > 0;
    this.title.textContent = this.conversation.title || this.ways.untitled;
    this.list.classList.toggle("busy", this.busy);
    this.#views.forEach((view, place) => view.last(!this.busy && place === this.#views.length - 1));
  }

  /** Ask something. */
  async ask(text) {
    if (!text || this.busy || this.ways.whyNot()) return;
    this.field.value = "";
    this.#fit();
    this.conversation.title ||= this.ways.titleOf(text);
    const turn = { role: "user", text };
    this.conversation.turns.push(turn);
    this.#add(turn);
    await this.#answer(this.#fresh());
  }

  #fresh() {
    const turn = { role: "assistant", text: "", finish: null };
    this.conversation.turns.push(turn);
    return this.#add(turn);
  }

  /** Have an answer written into a view; `goOn` after what is there. */
  async #answer(view, goOn = false) {
    if (this.busy) return;
    const abort = (this.#abort = new AbortController());
    const { conversation } = this;
    const { turn } = view;
    const before = goOn ? turn.text : "";
    const turns = conversation.turns.slice(0, conversation.turns.indexOf(turn) + (goOn ? 1 : 0));
    Object.assign(turn, { finish: null, error: null, model: theState()?.model?.name ?? "" });
    view.resume();
    this.refresh();
    this.stop.focus({ preventScroll: true });
    this.#toEnd();
    announce("Reading");
    keep(conversation); // a page that is closed now still has the question
    try {
      const told = await answer({
        messages: this.ways.messages(turns),
        goOn,
        signal: abort.signal,
        onReading: (done, total) => {
          view.reading(done, total);
          this.ways.onReading?.(done, total);
        },
        onText: (text, usage) => {
          if (!turn.text) announce("The answer begins");
          turn.text = before + text;
          view.grow(usage);
        },
      });
      Object.assign(turn, told, { text: before + told.text });
    } catch (error) {
      turn.text = before + (error.text ?? "");
      Object.assign(turn, { finish: "error", error: error.message });
    }
    if (this.#abort === abort) this.#ended(view);
    await keep(conversation);
  }

  #ended(view) {
    const hadFocus = document.activeElement === this.stop;
    this.#abort = null;
    this.ways.onReading?.(0, 0);
    view.finish();
    this.refresh();
    this.ways.onAnswer?.(view);
    this.#follow();
    if (hadFocus) this.field.focus({ preventScroll: true });
    const { error, text, finish } = view.turn;
    if (error) announce(error);
    else announce(`${finish === "stopped" ? "Stopped." : "The answer:"} ${text.slice(0, 600)}`);
  }

  /** Stop what is being written, for another conversation to take the place. */
  halt() {
    this.#abort?.abort();
    this.#abort = null;
  }

  #again(view) {
    Object.assign(view.turn, { text: "", usage: null });
    this.#answer(view);
  }

  #edit(view) {
    if (this.busy) {
      toast("Stop the answer first");
      return;
    }
    view.edit((text) => {
      if (text === null || text === view.turn.text) return;
      const { turns } = this.conversation;
      const place = turns.indexOf(view.turn);
      turns.length = place;
      for (const old of this.#views.splice(place)) old.element.remove();
      this.ask(text);
    });
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${Math.min(this.field.scrollHeight + 2, 200)}px`;
  }

  /** On narrow screens the whole page scrolls, on wide ones the conversation alone. */
  get #scroller() {
    const own = getComputedStyle(this.scroll).overflowY !== "visible";
    return own ? this.scroll : document.scrollingElement;
  }

  #noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR;
  }

  #follow() {
    if (this.#follows && !$(this.ways.kind).hidden) this.#toEnd();
  }

  #toEnd() {
    this.#follows = true;
    const scroller = this.#scroller;
    scroller.scrollTop = scroller.scrollHeight;
  }
}
