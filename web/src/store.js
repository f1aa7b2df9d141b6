// Conversations, votes and preferences, kept in this browser.

let opened;
function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open('craton', 2);
    request.onupgradeneeded = () => {
      const there = request.result.objectStoreNames;
      for (const name of ['conversations', 'votes', 'rounds'])
        if (!there.contains(name)) request.result.createObjectStore(name, { keyPath: 'id' });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(store, mode, action) {
  const db = await open();
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(store, mode, { durability: 'strict' });
    const request = action(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = () => reject(transaction.error);
  });
}

export const all = store => run(store, 'readonly', s => s.getAll());
export const put = (store, value) => run(store, 'readwrite', s => s.put(structuredClone(value)));
export const remove = (store, id) => run(store, 'readwrite', s => s.delete(id));

export const newId = () =>
  crypto.getRandomValues(new Uint32Array(3)).reduce((t, n) => t + n.toString(36).padStart(7, '0'), '');

export function preference(name, fallback) {
  const text = localStorage.getItem(`craton.${name}`);
  try {
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}
export const setPreference = (name, value) => localStorage.setItem(`craton.${name}`, JSON.stringify(value));

// A conversation is a tree: an edit or another answer is a sibling. `leaf` is the end of the branch that is shown.
export function newConversation(model) {
  return { id: newId(), title: '', created: Date.now(), updated: Date.now(), model, nodes: {}, leaf: null };
}

export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, time: Date.now(), ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  return node;
}

export function branch(conversation) {
  const out = [];
  for (let id = conversation.leaf; id; id = conversation.nodes[id].parent) out.unshift(conversation.nodes[id]);
  return out;
}

export const siblings = (conversation, node) =>
  Object.values(conversation.nodes)
    .filter(n => n.parent === node.parent && n.role === node.role)
    .sort((a, b) => a.time - b.time);

// The newest end below a node.
export function newestLeaf(conversation, id) {
  for (;;) {
    const below = Object.values(conversation.nodes)
      .filter(n => n.parent === id)
      .sort((a, b) => b.time - a.time);
    if (!below.length) return id;
    id = below[0].id;
  }
}

export function removeSubtree(conversation, id) {
  const parent = conversation.nodes[id].parent;
  const drop = [id];
  while (drop.length) {
    const next = drop.pop();
    drop.push(
      ...Object.values(conversation.nodes)
        .filter(n => n.parent === next)
        .map(n => n.id),
    );
    delete conversation.nodes[next];
  }
  conversation.leaf = parent
    ? newestLeaf(conversation, parent)
    : (Object.values(conversation.nodes).find(n => !n.parent)?.id ?? null);
  if (conversation.leaf) conversation.leaf = newestLeaf(conversation, conversation.leaf);
}

export function asMarkdown(conversation) {
  if (conversation.text !== undefined) return conversation.text;
  const parts = [`# ${conversation.title || 'Conversation'}\n`];
  for (const n of branch(conversation)) {
    parts.push(`## ${n.role}${n.model ? ` (${n.model})` : ''}\n`);
    if (n.reasoning) parts.push(`> ${n.reasoning.replaceAll('\n', '\n> ')}\n`);
    parts.push(`${n.content}\n`);
    for (const c of n.calls ?? []) parts.push(`\`\`\`json\n${c.name}(${c.arguments})\n\`\`\`\n`);
  }
  return parts.join('\n');
}
