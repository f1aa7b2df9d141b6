// The chat page: history on the left, the conversation, the composer, settings on the right.
import * as api from './api.js';
import { Compare } from './compare.js';
import { copy, dialog, download, h, icon, iconButton, toast } from './dom.js';
import { fillAnswer, meterText, wireCopy } from './message.js';
import { render } from './render.js';
import * as settings from './settings.js';
import * as store from './store.js';

const whole = json => {
  try {
    return typeof JSON.parse(json) === 'object';
  } catch {
    return false;
  }
};

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

class App {
  models = [];
  conversations = [];
  current = null;
  settings = settings.load();
  answering = null; // {node, stopper}
  tokensShown = new Set();
  found = '';

  async start() {
    this.theme(store.preference('theme', null));
    this.conversations = (await store.all('conversations')).sort((a, b) => b.updated - a.updated);
    this.build();
    const last = this.conversations.find(c => c.id === store.preference('current', null));
    this.open(last ?? null);
    await this.loadModels();
    document.body.classList.add('ready');
    this.input.focus();
  }

  async loadModels() {
    try {
      this.models = await api.models();
    } catch (error) {
      if (error instanceof api.Unauthorised) return this.askKey();
      toast(error.message);
    }
    const wanted = store.preference('model', null);
    this.picker.replaceChildren(...this.models.map(m => h('option', { value: m.id }, m.id)));
    this.picker.value = this.models.some(m => m.id === wanted) ? wanted : (this.models[0]?.id ?? '');
    this.modelChanged();
  }

  get model() {
    return this.models.find(m => m.id === this.picker.value);
  }

  // ---- frame ----

  build() {
    this.list = h('nav', { class: 'list', 'aria-label': 'Conversations' });
    this.search = h('input', {
      type: 'search',
      placeholder: 'Search',
      'aria-label': 'Search conversations',
      oninput: () => ((this.found = this.search.value.trim().toLowerCase()), this.drawList()),
    });
    const file = h('input', { type: 'file', accept: '.json', hidden: true, onchange: () => this.import(file) });
    this.side = h(
      'aside',
      { class: 'sidebar', id: 'sidebar' },
      h(
        'div',
        { class: 'brand' },
        h('img', { src: '/page/icon.svg', alt: '', width: '26', height: '26' }),
        h('b', {}, 'Craton'),
        iconButton('close', 'Close history', () => this.toggleSide(false), { class: 'icon narrow-only' }),
      ),
      h('button', { type: 'button', class: 'new', onclick: () => this.fresh() }, icon('plus'), 'New chat'),
      h('div', { class: 'search' }, icon('search'), this.search),
      this.list,
      h(
        'div',
        { class: 'side-actions' },
        h(
          'button',
          { type: 'button', class: 'small', onclick: () => this.exportAll() },
          icon('download'),
          'Export all',
        ),
        h('button', { type: 'button', class: 'small', onclick: () => file.click() }, icon('upload'), 'Import'),
        file,
      ),
    );
    this.picker = h('select', { class: 'picker', 'aria-label': 'Model', onchange: () => this.modelChanged(true) });
    this.compareButton = iconButton('split', 'Side by side', () => this.toggleCompare(), { 'aria-pressed': 'false' });
    this.themeButton = iconButton('moon', 'Light or dark', () =>
      this.theme(document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark', true),
    );
    const top = h(
      'header',
      { class: 'top' },
      iconButton('menu', 'History', () => this.toggleSide()),
      this.picker,
      h('span', { class: 'grow' }),
      this.compareButton,
      iconButton('download', 'Export this conversation', () => this.exportOne()),
      this.themeButton,
      iconButton('tune', 'Settings', () => this.toggleSettings()),
      iconButton('help', 'Keyboard shortcuts', () => this.help(), { class: 'icon wide-only' }),
    );
    this.thread = h('div', { class: 'thread' });
    this.scroller = h('main', { id: 'main', tabindex: '-1' }, this.thread);
    this.input = h('textarea', {
      rows: '1',
      placeholder: 'Message',
      'aria-label': 'Message',
      enterkeyhint: 'send',
      oninput: () => this.grow(),
      onkeydown: e => this.key(e),
    });
    this.sendButton = h(
      'button',
      { type: 'submit', class: 'send', 'aria-label': 'Send', title: 'Send (Enter)' },
      icon('send'),
    );
    this.notice = h('div', { class: 'notice' });
    const composer = h(
      'form',
      { class: 'composer', onsubmit: e => (e.preventDefault(), this.answering ? this.stop() : this.submit()) },
      this.input,
      this.sendButton,
    );
    this.drawer = h('aside', { class: 'drawer', 'aria-label': 'Settings', inert: true });
    document.body.replaceChildren(
      h('a', { class: 'skip', href: '#main' }, 'To the conversation'),
      this.side,
      h('div', { class: 'shade', onclick: () => (this.toggleSide(false), this.toggleSettings(false)) }),
      h('div', { class: 'page' }, top, this.scroller, h('footer', {}, this.notice, composer)),
      this.drawer,
    );
    wireCopy(document.body);
    document.addEventListener('keydown', e => this.shortcut(e));
    this.compare = new Compare(this);
    this.comparing = false;
    if (matchMedia('(min-width: 900px)').matches && store.preference('side', true)) this.toggleSide(true);
    else this.toggleSide(false);
  }

  theme(name, keep = false) {
    const dark = name ? name === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    document.documentElement.dataset.theme = dark ? 'dark' : 'light';
    if (keep) store.setPreference('theme', name);
    this.themeButton?.replaceChildren(icon(dark ? 'sun' : 'moon'));
  }

  toggleSide(open = !document.body.classList.contains('side-open')) {
    document.body.classList.toggle('side-open', open);
    this.side.inert = !open;
    if (matchMedia('(min-width: 900px)').matches) store.setPreference('side', open);
  }

  toggleSettings(open = !document.body.classList.contains('drawer-open')) {
    document.body.classList.toggle('drawer-open', open);
    this.drawer.inert = !open;
    if (open) {
      this.drawSettings();
      this.drawer.querySelector('textarea, input')?.focus();
    }
  }

  drawSettings() {
    const changed = () => store.setPreference('settings', this.settings);
    this.drawer.replaceChildren(
      h(
        'div',
        { class: 'drawer-head' },
        h('h2', {}, 'Settings'),
        h(
          'button',
          { type: 'button', class: 'small', onclick: () => ((this.settings = {}), changed(), this.drawSettings()) },
          "Server's defaults",
        ),
        iconButton('close', 'Close settings', () => (this.toggleSettings(false), this.input.focus())),
      ),
      settings.settingsForm(this.settings, this.model, changed),
      settings.probabilitiesSwitch(),
      h('button', { type: 'button', class: 'small', onclick: () => this.askKey() }, 'API key'),
    );
  }

  modelChanged(keep = false) {
    if (keep) store.setPreference('model', this.picker.value);
    const m = this.model;
    this.notice.textContent = m?.pretrained_only
      ? 'This model was only pretrained: it goes on with your text rather than answering.'
      : m && !m.chat
        ? 'This model has no chat template: it goes on with your text.'
        : '';
    if (document.body.classList.contains('drawer-open')) this.drawSettings();
    if (this.comparing) this.compare.drawSetup();
  }

  askKey() {
    const input = h('input', {
      type: 'password',
      value: store.preference('key', ''),
      autocomplete: 'off',
      'aria-label': 'API key',
    });
    dialog(
      'API key',
      h('div', { class: 'field' }, h('p', {}, "The server's operator has it. It stays in this browser."), input),
      [
        close =>
          h(
            'button',
            {
              type: 'button',
              class: 'primary',
              onclick: async () => (store.setPreference('key', input.value.trim()), close(), await this.loadModels()),
            },
            'Keep',
          ),
      ],
    );
  }

  // ---- history ----

  drawList() {
    const words = this.found;
    const rows = [];
    for (const c of this.conversations) {
      const title = c.title || 'New chat';
      let snippet = null;
      if (words) {
        const hit = Object.values(c.nodes).find(n => n.content.toLowerCase().includes(words));
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
  }

  narrow() {
    return !matchMedia('(min-width: 900px)').matches;
  }

  fresh() {
    this.toggleCompare(false);
    this.open(null);
    if (this.narrow()) this.toggleSide(false);
    this.input.focus();
  }

  open(conversation) {
    if (this.comparing && conversation) this.toggleCompare(false);
    this.current = conversation;
    store.setPreference('current', conversation?.id ?? null);
    this.tokensShown.clear();
    this.draw();
    this.drawList();
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  async save(conversation = this.current) {
    conversation.updated = Date.now();
    this.conversations = [conversation, ...this.conversations.filter(c => c !== conversation)];
    await store.put('conversations', conversation);
    this.drawList();
  }

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
              await store.remove('conversations', conversation.id);
              this.conversations = this.conversations.filter(c => c !== conversation);
              if (this.current === conversation) this.open(null);
              else this.drawList();
            },
          },
          'Delete',
        ),
    ]);
  }

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
  }

  exportAll() {
    if (!this.conversations.length) return toast('There is no conversation yet.');
    download('craton-conversations.json', 'application/json', JSON.stringify(this.conversations, null, 1));
  }

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
  }

  // ---- the conversation ----

  draw() {
    if (this.comparing) return;
    const nodes = this.current ? store.branch(this.current) : [];
    if (!nodes.length) {
      this.thread.replaceChildren(
        h(
          'div',
          { class: 'empty' },
          h('img', { src: '/page/icon.svg', alt: '', width: '56', height: '56' }),
          h('h1', {}, 'What is on your mind?'),
          h('p', {}, 'Everything stays on this server and in this browser.'),
        ),
      );
      return;
    }
    this.thread.replaceChildren(...nodes.filter(n => n.role !== 'tool').map(n => this.drawNode(n)));
  }

  drawNode(node) {
    const busy = this.answering?.node === node;
    const same = store.siblings(this.current, node);
    const at = same.indexOf(node);
    const turn =
      same.length > 1 &&
      h(
        'span',
        { class: 'turns' },
        iconButton('left', 'Previous version', () => this.show(same[at - 1]), { disabled: at === 0 || this.answering }),
        h('span', { 'aria-label': `Version ${at + 1} of ${same.length}` }, `${at + 1}/${same.length}`),
        iconButton('right', 'Next version', () => this.show(same[at + 1]), {
          disabled: at === same.length - 1 || this.answering,
        }),
      );
    if (node.role === 'user') {
      return h(
        'article',
        { class: 'message user', 'data-id': node.id, 'aria-label': 'You' },
        h('div', { class: 'bubble prose', innerHTML: render(node.content) }),
        h(
          'div',
          { class: 'tools' },
          turn,
          iconButton('copy', 'Copy', () => copy(node.content)),
          iconButton('edit', 'Edit and ask again', () => this.edit(node), { disabled: this.answering }),
        ),
      );
    }
    const box = h('div', { class: 'answer' });
    this.fill(box, node);
    const asTokens = this.tokensShown.has(node.id);
    return h(
      'article',
      {
        class: 'message assistant',
        'data-id': node.id,
        'aria-label': `${node.model ?? 'Model'}`,
        'aria-busy': busy ? 'true' : null,
      },
      h('div', { class: 'who' }, node.model),
      box,
      !busy &&
        h(
          'div',
          { class: 'tools' },
          turn,
          iconButton('copy', 'Copy', () => copy(node.content)),
          iconButton('again', 'Answer again', () => this.regenerate(node), { disabled: this.answering }),
          node.tokens?.length > 0 &&
            iconButton(
              'chart',
              'Token probabilities',
              () => (asTokens ? this.tokensShown.delete(node.id) : this.tokensShown.add(node.id), this.redraw(node)),
              { 'aria-pressed': String(asTokens) },
            ),
          iconButton('trash', 'Delete from here', () => this.cut(node), { disabled: this.answering }),
          h('span', { class: 'meter' }, meterText(node.meter)),
        ),
    );
  }

  fill(box, node) {
    const last = this.current && this.current.leaf === node.id;
    fillAnswer(box, node, {
      streaming: this.answering?.node === node,
      asTokens: this.tokensShown.has(node.id),
      onResult: last ? (call, text) => this.giveResult(node, call, text) : null,
    });
  }

  redraw(node) {
    const old = this.thread.querySelector(`[data-id="${node.id}"]`);
    old?.replaceWith(this.drawNode(node));
  }

  show(node) {
    this.current.leaf = store.newestLeaf(this.current, node.id);
    this.save();
    this.draw();
  }

  cut(node) {
    store.removeSubtree(this.current, node.id);
    this.save();
    this.draw();
  }

  edit(node) {
    const article = this.thread.querySelector(`[data-id="${node.id}"]`);
    const area = h('textarea', {
      class: 'edit',
      'aria-label': 'Edit message',
      value: node.content,
      rows: String(Math.min(12, node.content.split('\n').length + 1)),
    });
    const cancel = () => this.redraw(node);
    const done = () => {
      const text = area.value.trim();
      if (!text || text === node.content) return cancel();
      store.addNode(this.current, node.parent, { role: 'user', content: text });
      this.answer();
    };
    area.addEventListener('keydown', e => {
      if (e.key === 'Escape') (e.stopPropagation(), cancel());
      if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) (e.preventDefault(), done());
    });
    article.replaceChildren(
      area,
      h(
        'div',
        { class: 'tools always' },
        h('button', { type: 'button', class: 'small', onclick: cancel }, 'Cancel'),
        h('button', { type: 'button', class: 'small primary', onclick: done }, 'Ask'),
      ),
    );
    area.focus();
  }

  regenerate(node) {
    this.current.leaf = node.parent;
    this.answer();
  }

  giveResult(node, call, text) {
    if (this.answering) return;
    call.result = text;
    if (node.calls.some(c => c.result === null)) return this.redraw(node);
    this.answer();
  }

  messages() {
    return store.branch(this.current).flatMap(n => {
      if (n.role === 'user') return [{ role: 'user', content: n.content }];
      const message = { role: 'assistant', content: n.content };
      const calls = (n.calls ?? []).filter(c => whole(c.arguments)); // one that was cut off was never made
      if (calls.length)
        message.tool_calls = calls.map(c => ({
          id: c.id,
          type: 'function',
          function: { name: c.name, arguments: c.arguments },
        }));
      return [message, ...calls.map(c => ({ role: 'tool', tool_call_id: c.id, content: c.result ?? '' }))];
    });
  }

  async submit() {
    const text = this.input.value.trim();
    if (!text || this.answering || this.compareBusy) return;
    if (!this.model) return this.loadModels();
    this.input.value = '';
    this.grow();
    if (this.comparing) return this.compare.ask(text);
    if (!this.current) {
      this.current = store.newConversation(this.model.id);
      this.conversations.unshift(this.current);
      store.setPreference('current', this.current.id);
    }
    if (!this.current.title) this.current.title = text.replace(/\s+/g, ' ').slice(0, 60);
    store.addNode(this.current, this.current.leaf, { role: 'user', content: text });
    await this.answer();
  }

  async answer() {
    const conversation = this.current;
    const messages = this.messages();
    const model = this.model;
    const node = store.addNode(conversation, conversation.leaf, {
      role: 'assistant',
      content: '',
      reasoning: '',
      calls: [],
      tokens: [],
      model: model.id,
      settings: { ...this.settings },
    });
    const stopper = new AbortController();
    this.answering = { node, stopper, conversation };
    this.busy(true);
    this.draw();
    this.scroller.scrollTop = this.scroller.scrollHeight;
    await this.save(conversation);
    let frame = 0;
    const update = out => {
      Object.assign(node, { content: out.content, reasoning: out.reasoning, calls: out.calls });
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        const box = this.current === conversation && this.thread.querySelector(`[data-id="${node.id}"] .answer`);
        if (box) this.fill(box, node);
        this.follow();
      });
    };
    let last = null;
    try {
      last = await api.answer({
        model,
        messages,
        settings: this.settings,
        probabilities: store.preference('probabilities', true),
        signal: stopper.signal,
        update: out => ((last = out), update(out)),
      });
    } catch (error) {
      if (error instanceof api.Unauthorised) this.askKey();
      if (error.name === 'AbortError') node.stopped = true;
      else node.error = error.message;
    }
    cancelAnimationFrame(frame);
    if (last)
      Object.assign(node, {
        content: last.content,
        reasoning: last.reasoning,
        calls: last.calls,
        tokens: last.tokens,
        finish: last.finish,
        meter: last.meter,
      });
    this.answering = null;
    this.busy(false);
    if (conversation.nodes[node.id]) await this.save(conversation);
    this.draw();
    if (this.current === conversation) this.follow();
  }

  stop() {
    this.answering?.stopper.abort();
    if (this.comparing) this.compare.stop();
  }

  busy(on) {
    this.compareBusy = this.comparing && on;
    this.sendButton.replaceChildren(icon(on ? 'stop' : 'send'));
    this.sendButton.setAttribute('aria-label', on ? 'Stop' : 'Send');
    this.sendButton.title = on ? 'Stop (Escape)' : 'Send (Enter)';
    this.sendButton.type = on ? 'button' : 'submit';
    this.sendButton.onclick = on ? () => this.stop() : null;
    document.body.classList.toggle('busy', on);
  }

  // Stay at the end while an answer grows, unless the reader has gone up.
  follow() {
    const s = this.scroller;
    if (s.scrollHeight - s.scrollTop - s.clientHeight < 120) s.scrollTop = s.scrollHeight;
  }

  // ---- side by side ----

  toggleCompare(on = !this.comparing) {
    if (on === this.comparing) return;
    if (this.answering) this.stop();
    this.compare.stop();
    this.comparing = on;
    document.body.classList.toggle('comparing', on);
    this.compareButton.setAttribute('aria-pressed', String(on));
    if (on) this.thread.replaceChildren(this.compare.view());
    else this.draw();
    this.input.focus();
  }

  // ---- keys ----

  grow() {
    this.input.style.height = 'auto';
    this.input.style.height = `${Math.min(this.input.scrollHeight, 220)}px`;
  }

  key(e) {
    if (e.key === 'Enter' && !e.shiftKey && !e.isComposing) {
      e.preventDefault();
      this.submit();
    } else if (e.key === 'ArrowUp' && !this.input.value && this.current && !this.comparing) {
      const mine = store
        .branch(this.current)
        .filter(n => n.role === 'user')
        .at(-1);
      if (mine && !this.answering) (e.preventDefault(), this.edit(mine));
    }
  }

  shortcut(e) {
    if (document.querySelector('dialog[open]')) return;
    const command = e.ctrlKey || e.metaKey;
    if (e.key === 'Escape') {
      if (this.answering || this.compareBusy) this.stop();
      else if (document.body.classList.contains('drawer-open')) (this.toggleSettings(false), this.input.focus());
      else this.input.focus();
    } else if (command && e.key === 'k') (e.preventDefault(), this.toggleSide(true), this.search.focus());
    else if (command && e.shiftKey && e.key.toLowerCase() === 'o') (e.preventDefault(), this.fresh());
    else if (command && e.key === ',') (e.preventDefault(), this.toggleSettings());
    else if (command && e.key === '\\') (e.preventDefault(), this.toggleCompare());
    else if (e.key === '?' && !/^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName)) this.help();
  }

  help() {
    const rows = [
      ['Enter', 'Send'],
      ['Shift Enter', 'New line'],
      ['Escape', 'Stop'],
      ['↑', 'Edit the last message'],
      ['Ctrl K', 'Search conversations'],
      ['Ctrl Shift O', 'New chat'],
      ['Ctrl ,', 'Settings'],
      ['Ctrl \\', 'Side by side'],
      ['← →', 'From token to token'],
      ['?', 'This list'],
    ];
    dialog(
      'Keyboard',
      h(
        'dl',
        { class: 'keys' },
        rows.flatMap(([k, t]) => [h('dt', {}, ...k.split(' ').map(x => h('kbd', {}, x))), h('dd', {}, t)]),
      ),
      [close => h('button', { type: 'button', class: 'primary', onclick: close }, 'Close')],
    );
  }
}

new App().start();
