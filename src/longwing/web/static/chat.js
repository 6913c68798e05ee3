// The Chat tab: a conversation without a document.

import { $ } from "./dom.js";
import { parameters } from "./params.js";
import { onState, theState } from "./session.js";
import { Talk } from "./talk.js";

/** Set the tab up. */
export function startChat() {
  const talk = new Talk($("chat-talk"), {
    kind: "chat",
    placeholder: "Say something",
    verb: "Send",
    untitled: "New conversation",
    hint: "Conversations stay in this browser.",
    messages,
    whyNot: () => (theState() && theState().status !== "ready" ? "The model is not ready." : ""),
    titleOf: (text) => text.slice(0, 80),
    toExport: () => ({ conversation: talk.conversation }),
  });
  onState(() => talk.refresh());
}

function messages(turns) {
  const system = parameters().system.trim();
  const said = turns.map(({ role, text }) => ({ role, content: text }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}
