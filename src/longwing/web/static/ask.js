// The Ask tab: a document on one side, questions about it on the other.
//
// A prompt has the document first and the questions after it, so that every prompt about a document
// begins with the same tokens, and the server's prefix cache has them already: a follow-up reads only
// what is new, and the line under its answer says so.

import { ApiError, call, events } from "./api.js";
import { $, announce, bytes, h, icon, toast } from "./dom.js";
import { indexed, quotesIn } from "./quotes.js";
import { fitWords, Reader, soFarWords } from "./reader.js";
import { longestPrompt, onState, theSession, theState, tooLarge } from "./session.js";
import { documentOf, keepDocument, keepSetting, newId, setting } from "./store.js";
import { Talk } from "./talk.js";

const WANTED = "Quote the words of the document that your answer rests on.";
const MOST_SHOWN = 8; // quotations listed under an answer

let doc = null; // {id, name, text, tokens, promptBytes, model, pageStarts, warnings}
let loading = null; // the AbortController of a file that is being read
let index = null; // of its words, for quotations
let reader = null;
let talk = null;

/** Set the tab up. */
export function startAsk() {
  reader = new Reader($("reader"), { onClose: () => (loading ? loading.abort() : putAway()) });
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
  if (loading) return "The document is being read.";
  if (!doc) return "Drop a document first.";
  if (theState() && theState().status !== "ready") return "The model is not ready.";
  if (doc.tokens === null) return "The document is not counted yet.";
  if (doc.tokens >= longestPrompt()) {
    return "Longer than the model can read: drop a shorter one, or load a longer context.";
  }
  return tooLarge(doc.promptBytes ?? 0);
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
  const place = $("ask-document");
  const holdsFiles = (event) => [...event.dataTransfer.types].includes("Files");
  for (const kind of ["dragenter", "dragover"]) {
    panel.addEventListener(kind, (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      place.classList.add("over");
    });
  }
  panel.addEventListener("dragleave", (event) => {
    if (!panel.contains(event.relatedTarget)) place.classList.remove("over");
  });
  // A file that misses the tab must not replace the page.
  for (const kind of ["dragover", "drop"]) {
    addEventListener(kind, (event) => holdsFiles(event) && event.preventDefault());
  }
  panel.addEventListener("drop", (event) => {
    place.classList.remove("over");
    const [dropped, ...others] = event.dataTransfer.files;
    if (dropped) load(dropped, dropped.name);
    if (others.length) toast("One document at a time: the first was taken");
  });
  addEventListener("paste", (event) => {
    if (panel.hidden || doc || event.target.matches?.("input, textarea")) return;
    const text = event.clipboardData.getData("text/plain");
    if (text.trim()) load(new Blob([text]), "Pasted text.txt");
  });
}

/**
 * Take a file: the server makes text of it, and counts its tokens as it goes. The former document
 * stays until this one is read; so it does if it cannot be.
 */
async function load(blob, name) {
  loading?.abort();
  const mine = (loading = new AbortController());
  complain("");
  showLoading(name);
  announce(`Reading ${name}`);
  try {
    const told = await extracted(blob, name, { signal: mine.signal, onPiece: showPiece });
    if (loading !== mine) return;
    doc = {
      id: newId(),
      name: told.title || name,
      text: told.text,
      pageStarts: told.page_starts && inUtf16(told.text, told.page_starts),
      warnings: told.warnings,
      ...counted(told),
    };
    index = null;
    loading = null;
    showDocument();
    talk.begin();
    await keepDocument(doc);
  } catch (error) {
    if (loading !== mine) return;
    loading = null;
    if (error.name !== "AbortError") complain(`${name}: ${error.message}`);
    showHead();
  }
}

/**
 * The server's text of a file, with what it says of it; `onPiece` hears of each piece as it comes.
 *
 * Throws ApiError if the file cannot be read.
 */
async function extracted(blob, name, { signal, onPiece }) {
  const most = theSession()?.limits.document_bytes ?? Infinity;
  if (blob.size > most) {
    throw new ApiError(413, `${bytes(blob.size)}; the server takes files of ${bytes(most)} at most.`);
  }
  const response = await call(`/ui/api/documents?name=${encodeURIComponent(name)}`, {
    method: "POST",
    body: blob,
    type: "application/octet-stream",
    signal,
  });
  let text = "";
  for await (const { data } of events(response)) {
    if (data.document) return { ...data.document, text };
    text += data.text;
    onPiece(data);
  }
  throw new ApiError(0, "The connection ended before all was read. Drop it again.");
}

const counted = ({ tokens, prompt_bytes: promptBytes }) => ({
  tokens,
  promptBytes,
  model: theState()?.model?.name,
});

/** Say why a file was not taken, where the person looks: in the drop zone or over the document. */
function complain(words) {
  $("drop-problem").textContent = words;
  reader.problem.textContent = words;
  if (words) announce(words);
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
  complain("");
  showDocument();
  talk.begin();
  $("drop-choose").focus();
}

/** A conversation that has not begun is about the document that lies there. */
function claim() {
  if (doc && talk) talk.conversation.documentId = doc.id;
}

async function reopen(conversation) {
  loading?.abort();
  loading = null;
  doc = (await documentOf(conversation.documentId)) ?? null;
  index = null;
  complain("");
  showDocument();
  await recount();
}

function showDocument() {
  reader.show(doc);
  showHead();
  if (doc) announce(`${doc.name}: ${reader.facts.textContent}`);
}

/** What stands over the document: its own name and size, or those of what is being read. */
function showHead() {
  $("drop").hidden = Boolean(doc || loading);
  $("reader").hidden = !(doc || loading);
  reader.loading(null);
  measure();
  talk.refresh();
}

function showLoading(name) {
  showHead();
  reader.loading(name);
  showPiece({ tokens: 0, share: 0 });
}

function showPiece(piece) {
  reader.measure(piece.tokens, longestPrompt(), soFarWords(piece, longestPrompt()));
}

function measure() {
  if (!doc || loading) return;
  const limit = longestPrompt();
  reader.measure(doc.tokens, limit, fitWords(doc.tokens, limit, doc.text.length));
}

/** Another model counts otherwise. */
async function recount() {
  const model = theState()?.model?.name;
  if (doc && model && doc.model !== model && theState().status === "ready") {
    const again = Object.assign(doc, { tokens: null, model });
    talk.refresh();
    try {
      const onPiece = (piece) => again === doc && !loading && showPiece(piece);
      Object.assign(again, counted(await extracted(new Blob([again.text]), "text.txt", { onPiece })));
      await keepDocument(again);
    } catch (error) {
      complain(`It could not be counted: ${error.message}`);
    }
  }
  measure();
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
