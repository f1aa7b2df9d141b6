// The list of conversations: drawn, opened, kept, exported. Methods of App (main.js).

import { dialog, download, h, iconButton, toast } from './dom.js';
import * as store from './store.js';

// Whether imported messages are what this page writes: texts, each with its own name, and parents that lead to a root.
const sound = nodes =>
  Object.entries(nodes).every(([id, n]) => {
    if (n?.id !== id || typeof n.content !== 'string' || typeof n.role !== 'string') return false;
    const seen = new Set();
    for (let at = id; at; at = nodes[at].parent)
      if (seen.has(at) || !nodes[at]) return false;
      else seen.add(at);
    return true;
  });

// 'Today', 'Yesterday', 'This week', or the month.
function dayOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = (midnight - time) / 86_400_000;
  if (days <= 0) return 'Today';
  if (days <= 1) return 'Yesterday';
  return days <= 7 ? 'This week' : new Date(time).toLocaleDateString('en', { month: 'long', year: 'numeric' });
}

export const history = {
  drawList() {
    const words = this.found;
    const rows = [];
    let lastDay = '';
    for (const c of this.conversations) {
      const title = c.title || 'New chat';
      let snippet = null;
      if (words) {
        const texts = [...Object.values(c.nodes), ...(c.text ? [{ content: c.text }] : [])];
        const hit = texts.find(n => n.content.toLowerCase().includes(words));
        if (!hit && !title.toLowerCase().includes(words)) continue;
        if (hit) {
          const at = hit.content.toLowerCase().indexOf(words);
          const text = hit.content.slice(Math.max(0, at - 24), at + words.length + 40).replaceAll('\n', ' ');
          const mark = text.toLowerCase().indexOf(words);
          snippet = h(
            'span',
            { class: 'snippet' },
            text.slice(0, mark),
            h('mark', {}, text.slice(mark, mark + words.length)),
            text.slice(mark + words.length),
          );
        }
      }
      const day = dayOf(c.updated);
      if (!words && day !== lastDay) rows.push(h('h3', { class: 'day' }, (lastDay = day)));
      rows.push(
        h(
          'div',
          { class: `row${c === this.current ? ' current' : ''}` },
          h(
            'button',
            {
              type: 'button',
              class: 'title',
              'aria-current': c === this.current ? 'true' : null,
              onclick: () => (this.open(c), this.narrow() && this.toggleSide(false)),
              ondblclick: () => this.rename(c),
              title: 'Double-click to rename',
            },
            h('span', {}, title),
            snippet,
          ),
          iconButton('trash', `Delete ${title}`, () => this.delete(c)),
        ),
      );
    }
    this.list.replaceChildren(
      ...(rows.length
        ? rows
        : [h('p', { class: 'none' }, words ? 'Nothing found.' : 'Conversations stay in this browser.')]),
    );
  },

  narrow() {
    return !matchMedia('(min-width: 900px)').matches;
  },

  fresh() {
    this.toggleCompare(false);
    this.open(null);
    if (this.narrow()) this.toggleSide(false);
    (this.isNotebook ? this.sheet : this.input).focus();
  },

  open(conversation) {
    if (this.comparing && conversation) this.toggleCompare(false);
    this.saveNow();
    this.current = conversation;
    store.setPreference('current', conversation?.id ?? null);
    this.tokensShown.clear();
    this.stick = true;
    this.draw();
    this.drawList();
    this.follow();
  },

  async save(conversation = this.current) {
    conversation.updated = Date.now();
    this.conversations = [conversation, ...this.conversations.filter(c => c !== conversation)];
    await store.put('conversations', conversation);
    this.drawList();
  },

  rename(conversation) {
    const input = h('input', { type: 'text', class: 'name', value: conversation.title, 'aria-label': 'Name' });
    const keep = close => {
      close();
      if (!input.value.trim()) return;
      Object.assign(conversation, { title: input.value.trim(), renamed: true });
      this.save(conversation);
    };
    const box = dialog('Rename', input, [
      close => h('button', { type: 'button', class: 'primary', onclick: () => keep(close) }, 'Keep'),
    ]);
    input.addEventListener('keydown', e => e.key === 'Enter' && (e.preventDefault(), keep(() => box.close())));
    input.focus();
    input.select();
  },

  delete(conversation) {
    dialog(`Delete “${conversation.title || 'New chat'}”?`, h('p', {}, 'It is only in this browser.'), [
      close => h('button', { type: 'button', onclick: close }, 'Keep'),
      close =>
        h(
          'button',
          {
            type: 'button',
            class: 'danger',
            onclick: async () => {
              close();
              if (this.answering?.conversation === conversation) this.stop();
              if (this.unsaved === conversation) this.unsaved = null;
              await store.remove('conversations', conversation.id);
              this.conversations = this.conversations.filter(c => c !== conversation);
              if (this.current === conversation) this.open(null);
              else this.drawList();
            },
          },
          'Delete',
        ),
    ]);
  },

  exportOne() {
    const c = this.current;
    if (!c) return toast('There is no conversation yet.');
    const name = (c.title || 'conversation').replace(/[^\p{L}\p{N}]+/gu, '-').slice(0, 40);
    dialog(
      'Export this conversation',
      h('p', {}, 'JSON holds every branch and can be imported again; Markdown holds what is shown.'),
      [
        close =>
          h(
            'button',
            { type: 'button', onclick: () => (close(), download(`${name}.md`, 'text/markdown', store.asMarkdown(c))) },
            'Markdown',
          ),
        close =>
          h(
            'button',
            {
              type: 'button',
              class: 'primary',
              onclick: () => (close(), download(`${name}.json`, 'application/json', JSON.stringify([c], null, 1))),
            },
            'JSON',
          ),
      ],
    );
  },

  exportAll() {
    if (!this.conversations.length) return toast('There is no conversation yet.');
    download('craton-conversations.json', 'application/json', JSON.stringify(this.conversations, null, 1));
  },

  async import(file) {
    try {
      const list = JSON.parse(await file.files[0].text());
      const good = (Array.isArray(list) ? list : [list]).filter(
        c =>
          typeof c?.id === 'string' &&
          typeof c.nodes === 'object' &&
          typeof c.title === 'string' &&
          sound(c.nodes) &&
          (c.leaf === null || c.nodes[c.leaf]),
      );
      if (!good.length) throw new Error();
      for (const c of good) {
        if (this.conversations.some(o => o.id === c.id)) c.id = store.newId();
        await store.put('conversations', c);
        this.conversations.push(c);
      }
      this.conversations.sort((a, b) => b.updated - a.updated);
      this.drawList();
      toast(`${good.length} imported.`);
    } catch {
      toast('That file holds no conversations.');
    }
    file.value = '';
  },

  // ---- the conversation ----
};
