// Earlier conversations: the list that History opens, and files made of one.

import { $, h, icon, iconButton, save, toast, when } from "./dom.js";
import { conversations, forget } from "./store.js";

/** Open the list of a talk's earlier conversations. */
export async function openHistory(talk) {
  const dialog = $("history");
  await fill(dialog, talk);
  dialog.showModal();
}

async function fill(dialog, talk) {
  const kept = await conversations(talk.ways.kind);
  const list = $("history-list");
  list.replaceChildren(...kept.map((conversation) => entry(dialog, talk, conversation)));
  $("history-empty").hidden = kept.length > 0;
}

function entry(dialog, talk, conversation) {
  const open = () => {
    dialog.close();
    talk.open(conversation);
  };
  const remove = async () => {
    await forget(conversation);
    if (talk.conversation.id === conversation.id) talk.begin();
    await fill(dialog, talk);
    toast("Deleted");
  };
  const questions = conversation.turns.filter((turn) => turn.role === "user").length;
  const about = [
    when(conversation.changed),
    questions === 1 ? "1 question" : `${questions} questions`,
  ];
  return h(
    "li.history-entry",
    {},
    h(
      "button.history-open",
      { type: "button", onclick: open },
      h("span.history-title", {}, conversation.title),
      h("span.help", {}, about.join(" · ")),
    ),
    iconButton("delete", `Delete “${conversation.title}”`, remove),
  );
}

/** A menu that saves a conversation; `made()` gives {conversation, document}, or null if empty. */
export function exportMenu(made) {
  const menu = h(
    "details.menu",
    {},
    h("summary.quiet", {}, icon("save"), "Export"),
    h(
      "div.menu-body",
      {},
      h(
        "button.quiet",
        { type: "button", onclick: () => saveAs(toMarkdown, "md", "text/markdown") },
        "Markdown",
      ),
      h(
        "button.quiet",
        { type: "button", onclick: () => saveAs(toJson, "json", "application/json") },
        "JSON",
      ),
    ),
  );

  async function saveAs(written, suffix, type) {
    menu.open = false;
    const what = await made();
    if (!what?.conversation.turns.length) toast("There is nothing to export yet");
    else save(`${fileName(what.conversation.title)}.${suffix}`, written(what), type);
  }

  menu.addEventListener("focusout", (event) => {
    if (!menu.contains(event.relatedTarget)) menu.open = false;
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    menu.open = false;
    menu.querySelector("summary").focus();
  });
  return menu;
}

/** A title as a file's name on any system. */
const fileName = (title) =>
  title
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 60) || "conversation";

/** The conversation to be read by people. */
export function toMarkdown({ conversation, document }) {
  const head = [`# ${conversation.title}`, `*${new Date(conversation.began).toISOString()}*`];
  if (document) head.push(`Document: ${document.name}, ${document.tokens} tokens`);
  const turns = conversation.turns.map(({ role, text, model, error }) =>
    role === "user"
      ? `## Question\n\n${text}`
      : `## Answer${model ? ` (${model})` : ""}\n\n${text || `(${error || "none"})`}`,
  );
  return `${[...head, ...turns].join("\n\n")}\n`;
}

/** The conversation to be read by programs, with its document. */
export function toJson({ conversation, document }) {
  const { id: _id, documentId: _documentId, ...kept } = conversation;
  const whole = { format: "longwing conversation, 1", ...kept, document: document ?? null };
  return `${JSON.stringify(whole, null, 2)}\n`;
}
