// What this browser remembers: conversations and their documents in IndexedDB, settings in
// localStorage. None of it is ever sent anywhere but into prompts.
//
// A conversation is {id, kind: "ask" | "chat", title, began, changed, documentId?, turns}. Documents
// are kept apart, so that a list of conversations is read without their texts.

const NAME = "longwing";
const MOST = 200; // conversations kept; the oldest go first

let opened = null;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("documents", { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

/** Run one request of IndexedDB. Where there is none (private windows), nothing is remembered. */
async function within(store, mode, work) {
  try {
    const base = await database();
    return await new Promise((resolve, reject) => {
      const request = work(base.transaction(store, mode).objectStore(store));
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
  } catch (error) {
    console.warn("longwing: history is not kept:", error.message);
    return undefined;
  }
}

/** A new name for a conversation or document; also over plain HTTP, which has no randomUUID. */
export const newId = () =>
  [...crypto.getRandomValues(new Uint8Array(12))]
    .map((n) => n.toString(16).padStart(2, "0"))
    .join("");

/** All conversations of a kind, the latest first. */
export async function conversations(kind) {
  const all = (await within("conversations", "readonly", (store) => store.getAll())) ?? [];
  return all.filter((one) => one.kind === kind).sort((a, b) => b.changed - a.changed);
}

/** Remember a conversation as it is now. */
export async function keep(conversation) {
  conversation.changed = Date.now();
  await within("conversations", "readwrite", (store) => store.put(conversation));
  const kept = await conversations(conversation.kind);
  for (const old of kept.slice(MOST)) await forget(old);
}

/** Forget a conversation, and its document unless another one is about it. */
export async function forget(conversation) {
  await within("conversations", "readwrite", (store) => store.delete(conversation.id));
  const id = conversation.documentId;
  const others = id ? await conversations("ask") : [];
  if (id && !others.some((other) => other.documentId === id)) {
    await within("documents", "readwrite", (store) => store.delete(id));
  }
}

/** Remember a document: {id, name, text, tokens, …}. */
export const keepDocument = (text) => within("documents", "readwrite", (store) => store.put(text));

/** The document of this id, or undefined. */
export const documentOf = (id) => within("documents", "readonly", (store) => store.get(id));

/** A setting, or `fallback` if there is none or it cannot be read. */
export function setting(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`longwing.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

/** Remember a setting. */
export function keepSetting(name, value) {
  try {
    localStorage.setItem(`longwing.${name}`, JSON.stringify(value));
  } catch {
    // Full, or forbidden: the setting holds until the page is closed.
  }
}
