// The Ask tab: a document on one side, questions about it on the other.
//
// A prompt has the document first and the questions after it, so that every prompt about a document
// begins with the same tokens, and the server's prefix cache has them already: a follow-up reads only
// what is new, and the line under its answer says so.

import { ApiError, call } from "./api.js";
import { $, announce, h, icon } from "./dom.js";
import { indexed, quotesIn } from "./quotes.js";
import { fitWords, Reader } from "./reader.js";
import { longestPrompt, onState, theSession, theState } from "./session.js";
import { documentOf, keepDocument, keepSetting, newId, setting } from "./store.js";
import { Talk } from "./talk.js";

const WANTED = "Quote the words of the document that your answer rests on.";
const MOST_SHOWN = 8; // quotations listed under an answer

let doc = null; // {id, name, text, tokens, model, pageStarts}
let index = null; // of its words, for quotations
let reader = null;
let talk = null;

/** Set the tab up. */
export function startAsk() {
  reader = new Reader($("reader"), { onClose: () => putAway() });
  talk = new Talk($("ask-talk"), {
    kind: "ask",
    placeholder: "Ask about the document",
    verb: "Ask",
    untitled: "Questions",
    hint: "Answers come with the places in the document that they quote.",
    messages,
    whyNot,
    titleOf: (text) => `${doc.name}: ${text.slice(0, 80)}`,
    onReading: (done, total) => reader.reading(done, total),
    onAnswer: showQuotes,
    onNew: () => claim(),
    onOpen: reopen,
    toExport,
  });
  talk.form.prepend(quoteSwitch());
  startDrop();
  onState(recount);
  showDocument();
}

/** The document first, the question last; a follow-up adds to what was said. */
function messages(turns) {
  const wanted = $("ask-for-quotes").checked ? `\n\n${WANTED}` : "";
  return turns.map(({ role, text }, place) => ({
    role,
    content: place ? text : `${doc.text.trimEnd()}\n\n${text}${wanted}`,
  }));
}

function whyNot() {
  if (!doc) return "Drop a document first.";
  if (doc.tokens === null) return "The document is being counted.";
  if (doc.tokens >= longestPrompt()) return "The document is longer than the model can read.";
  return theState() && theState().status !== "ready" ? "The model is not ready." : "";
}

function quoteSwitch() {
  const box = h("input", {
    type: "checkbox",
    id: "ask-for-quotes",
    onchange: () => keepSetting("ask-for-quotes", box.checked),
  });
  box.checked = setting("ask-for-quotes", false);
  return h("label.check", { for: "ask-for-quotes" }, box, "Ask for quotations");
}

// The document: dropped, chosen, pasted or remembered.

function startDrop() {
  const zone = $("drop");
  const file = $("drop-file");
  $("drop-choose").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files[0]) load(file.files[0], file.files[0].name);
    file.value = "";
  });
  $("drop-paste").addEventListener("click", () => {
    const field = $("paste-field");
    field.value = "";
    $("paste").showModal();
  });
  $("paste").addEventListener("close", () => {
    const text = $("paste-field").value;
    if ($("paste").returnValue === "use" && text.trim()) load(new Blob([text]), "Pasted text.txt");
  });
  const panel = $("ask");
  const holdsFiles = (event) => [...event.dataTransfer.types].includes("Files");
  for (const kind of ["dragenter", "dragover"]) {
    panel.addEventListener(kind, (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  panel.addEventListener("dragleave", (event) => {
    if (!panel.contains(event.relatedTarget)) zone.classList.remove("over");
  });
  // A file that misses the tab must not replace the page.
  for (const kind of ["dragover", "drop"]) {
    addEventListener(kind, (event) => holdsFiles(event) && event.preventDefault());
  }
  panel.addEventListener("drop", (event) => {
    zone.classList.remove("over");
    const [dropped] = event.dataTransfer.files;
    if (dropped) load(dropped, dropped.name);
  });
  addEventListener("paste", (event) => {
    if (panel.hidden || doc || event.target.matches?.("input, textarea")) return;
    const text = event.clipboardData.getData("text/plain");
    if (text.trim()) load(new Blob([text]), "Pasted text.txt");
  });
}

/** Take a file: the server reads it, makes text of it and counts its tokens. */
async function load(blob, name) {
  const problem = $("drop-problem");
  const most = theSession()?.limits.document_bytes ?? Infinity;
  problem.textContent = "";
  putAway();
  $("drop").classList.add("busy");
  $("drop-progress").textContent = `Reading ${name}`;
  announce(`Reading ${name}`);
  try {
    if (blob.size > most)
      throw new ApiError(413, `${name} has more than the ${most} bytes that the server takes.`);
    const told = await extracted(blob, name);
    const pages = told.page_starts && inUtf16(told.text, told.page_starts);
    doc = {
      id: newId(),
      name: told.title || name,
      text: told.text,
      tokens: told.tokens,
      model: theState()?.model?.name,
      pageStarts: pages,
      warnings: told.warnings ?? [],
    };
    await keepDocument(doc);
    claim();
  } catch (error) {
    problem.textContent = error.message;
    announce(error.message);
  }
  $("drop").classList.remove("busy");
  showDocument();
  if (doc) talk.field.focus({ preventScroll: true });
}

async function extracted(blob, name) {
  const response = await call(`/ui/api/documents?name=${encodeURIComponent(name)}`, {
    method: "POST",
    body: blob,
    type: "application/octet-stream",
  });
  return response.json();
}

/** Places counted in characters, as Python counts them, in the UTF-16 units of a page's text. */
function inUtf16(text, starts) {
  const made = [];
  let at = 0;
  let characters = 0;
  for (const character of text) {
    while (made.length < starts.length && starts[made.length] <= characters) made.push(at);
    at += character.length;
    characters += 1;
  }
  while (made.length < starts.length) made.push(at);
  return made;
}

function putAway() {
  doc = index = null;
  talk.begin();
  showDocument();
}

/** A conversation that has not begun is about the document that lies there. */
function claim() {
  if (doc && talk) talk.conversation.documentId = doc.id;
}

async function reopen(conversation) {
  doc = (await documentOf(conversation.documentId)) ?? null;
  index = null;
  showDocument();
  await recount();
}

function showDocument() {
  $("drop").hidden = Boolean(doc);
  $("reader").hidden = !doc;
  if (doc) {
    reader.show(doc);
    measure();
    announce(`${doc.name}: ${reader.facts.textContent}`);
  }
  talk.refresh();
}

function measure() {
  const words = fitWords(doc.tokens, longestPrompt(), doc.text.length);
  reader.measure(doc.tokens, longestPrompt(), [words, ...doc.warnings].join(" · "));
}

/** Another model counts otherwise. */
async function recount() {
  const model = theState()?.model?.name;
  if (!doc || !model) {
    talk.refresh();
    return;
  }
  if (doc.model !== model && theState().status === "ready") {
    const counted = doc;
    Object.assign(counted, { tokens: null, model });
    measure();
    talk.refresh();
    const told = await extracted(new Blob([counted.text]), "text.txt");
    counted.tokens = told.tokens;
    await keepDocument(counted);
  }
  if (doc) measure();
  talk.refresh();
}

// Quotations.

function showQuotes(view) {
  view.extra.replaceChildren();
  if (!doc || !view.turn.text) return;
  index ??= indexed(doc.text);
  const found = quotesIn(view.turn.text, index);
  reader.quotes(found);
  if (!found.length) return;
  view.extra.append(
    h(
      "h4.help",
      {},
      found.length === 1 ? "In the document" : `In the document, ${found.length} places`,
    ),
    h(
      "ul.quotes",
      {},
      found.slice(0, MOST_SHOWN).map((quote) => quoteEntry(quote, found)),
    ),
  );
}

function quoteEntry(quote, all) {
  const words = doc.text.slice(quote.start, quote.stop).replace(/\s+/g, " ");
  const button = h(
    "button.quote",
    {
      type: "button",
      onclick: () => {
        reader.quotes(all);
        reader.jump(quote, button);
      },
    },
    icon("jump"),
    h("q", {}, words.length > 120 ? `${words.slice(0, 118)}…` : words),
    h("span.help", {}, reader.place(quote.start)),
  );
  return h("li", {}, button);
}

const toExport = () => ({
  conversation: talk.conversation,
  document: doc && { name: doc.name, tokens: doc.tokens, text: doc.text },
});
