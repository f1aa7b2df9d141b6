// The chat page: history on the left, the conversation, the composer, settings on the right.
import * as api from './api.js';
import { Compare } from './compare.js';
import { dialog, h, icon, iconButton, toast } from './dom.js';
import { history } from './history.js';
import { meterText, wireCopy } from './message.js';
import { notebook } from './notebook.js';
import * as settings from './settings.js';
import * as store from './store.js';
import { thread } from './thread.js';

// A model by name, size, context and bits a weight.
const modelLabel = m =>
  [
    m.id,
    m.parameters && `${short(m.parameters)} parameters`,
    m.context_length && `${m.context_length.toLocaleString('en')} tokens`,
    m.bits && m.bits < 16 && `${m.bits} bits`,
    m.pretrained_only && 'base',
  ]
    .filter(Boolean)
    .join(' · ');
// An icon with its name beside it where there is room.
const labelled = (name, word, label, onclick, more = {}) => {
  const button = iconButton(name, label, onclick, { class: 'icon labelled', ...more });
  button.append(h('span', { class: 'wide-only', 'aria-hidden': 'true' }, word));
  return button;
};
const short = n => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)}B` : n >= 1e6 ? `${(n / 1e6).toPrecision(3)}M` : n >= 1e3 ? `${(n / 1e3).toPrecision(3)}k` : `${n}`);

const whole = json => {
  try {
    return typeof JSON.parse(json) === 'object';
  } catch {
    return false;
  }
};

class App {
  models = [];
  conversations = [];
  current = null;
  settings = settings.load();
  answering = null; // {node, stopper}
  tokensShown = new Set();
  found = '';
  stick = true; // the end stays in view
  lastTop = 0;

  async start() {
    this.theme(store.preference('theme', null));
    this.conversations = (await store.all('conversations')).sort((a, b) => b.updated - a.updated);
    this.build();
    await this.compare.load();
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
    this.picker.replaceChildren(...this.models.map(m => h('option', { value: m.id }, modelLabel(m))));
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
    this.compareButton = labelled('split', 'Side by side', 'Side by side', () => this.toggleCompare(), { 'aria-pressed': 'false' });
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
      labelled('download', 'Export', 'Export this conversation', () => this.exportOne()),
      this.themeButton,
      labelled('tune', 'Settings', 'Settings', () => this.toggleSettings()),
      iconButton('help', 'Keyboard shortcuts', () => this.help(), { class: 'icon wide-only' }),
    );
    this.thread = h('div', { class: 'thread' });
    this.scroller = h('main', { id: 'main', tabindex: '-1', onscroll: () => this.scrolled() }, this.thread);
    this.endButton = iconButton('down', 'To the end', () => ((this.stick = true), this.follow()), {
      class: 'icon to-end',
      hidden: true,
    });
    new ResizeObserver(() => this.follow()).observe(this.thread);
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
      h('div', { class: 'page' }, top, this.scroller, h('footer', {}, this.endButton, this.notice, composer)),
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
      ? 'This model was only pretrained: it goes on with a text rather than answering.'
      : m && !m.chat
        ? 'This model has no chat template: it goes on with a text.'
        : '';
    if (!this.current) this.draw(); // an empty page is a notebook or a conversation, as the model wants
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
    const text = this.input.value; // as it was written
    if (!text.trim() || this.answering || this.compareBusy) return;
    if (!this.model) return this.loadModels();
    this.input.value = '';
    this.grow();
    if (this.comparing) return this.compare.ask(text);
    if (!this.current) {
      this.current = store.newConversation(this.model.id);
      this.conversations.unshift(this.current);
      store.setPreference('current', this.current.id);
    }
    if (!this.current.title) this.current.title = text.trim().replace(/\s+/g, ' ').slice(0, 60);
    store.addNode(this.current, this.current.leaf, { role: 'user', content: text });
    await this.answer();
  }

  // Answer what was said last, or go on with `begun`, an answer that was cut off.
  async answer(begun = null) {
    const conversation = this.current;
    const messages = this.messages();
    const model = this.model;
    const node =
      begun ??
      store.addNode(conversation, conversation.leaf, {
        role: 'assistant',
        content: '',
        reasoning: '',
        calls: [],
        tokens: [],
        model: model.id,
        settings: { ...this.settings },
      });
    const before = { content: node.content, reasoning: node.reasoning ?? '', tokens: node.tokens ?? [] };
    Object.assign(node, { finish: null, stopped: false, error: null });
    const stopper = new AbortController();
    this.answering = { node, stopper, conversation };
    this.stick = true;
    this.busy(true);
    this.draw();
    this.follow();
    await this.save(conversation);
    let frame = 0;
    const take = out =>
      Object.assign(node, {
        content: before.content + out.content,
        reasoning: before.reasoning + out.reasoning,
        calls: out.calls,
        meter: out.meter,
      });
    const update = out => {
      take(out);
      frame ||= requestAnimationFrame(() => {
        frame = 0;
        const article = this.current === conversation && this.thread.querySelector(`[data-id="${node.id}"]`);
        if (!article) return;
        this.fill(article.querySelector('.answer'), node);
        article.querySelector('.live').textContent = meterText(node.meter, model.context_length);
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
        goOn: begun !== null,
      });
    } catch (error) {
      if (error instanceof api.Unauthorised) this.askKey();
      if (error.name === 'AbortError') node.stopped = true;
      else node.error = error.message;
    }
    cancelAnimationFrame(frame);
    if (last) {
      take(last);
      Object.assign(node, { tokens: [...before.tokens, ...last.tokens], finish: last.finish });
    }
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

  // Stay at the end while something grows, unless the reader has gone up.
  follow() {
    if (this.stick) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.scrolled();
  }

  scrolled() {
    const s = this.scroller;
    const below = s.scrollHeight - s.scrollTop - s.clientHeight;
    if (s.scrollTop < this.lastTop - 1) this.stick = false;
    if (below < 40) this.stick = true;
    this.lastTop = s.scrollTop;
    this.endButton.hidden = below < 200;
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
      ['Ctrl Enter', 'Continue a text'],
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

Object.defineProperties(App.prototype, Object.getOwnPropertyDescriptors({ ...history, ...thread }));
Object.defineProperties(App.prototype, Object.getOwnPropertyDescriptors(notebook));
new App().start();
