// One text that a model goes on with, for models that were only pretrained: editable, what the model wrote tinted.
// Methods of App (main.js). A notebook is a conversation with `text` and `written`, ranges of it that the model wrote.

import * as api from './api.js';
import { h, icon, iconButton } from './dom.js';
import { meterText, tokenView } from './message.js';
import * as store from './store.js';

// The ranges after `text` became `next`: what is inside of the change is the writer's, what follows it moves along.
export function moved(written, text, next) {
  let start = 0;
  while (start < text.length && start < next.length && text[start] === next[start]) start++;
  let end = 0;
  while (end < text.length - start && end < next.length - start && text.at(-1 - end) === next.at(-1 - end)) end++;
  const oldEnd = text.length - end;
  const shift = next.length - text.length;
  const out = [];
  for (const [a, b] of written) {
    if (a < start) out.push([a, Math.min(b, start)]);
    if (b > oldEnd) out.push([Math.max(a, oldEnd) + shift, b + shift]);
  }
  return out.filter(([a, b]) => b > a);
}

export const notebook = {
  get isNotebook() {
    return this.current ? this.current.text !== undefined : this.model && (this.model.pretrained_only || !this.model.chat);
  },

  drawNotebook() {
    const text = this.current?.text ?? '';
    this.sheet = h('textarea', {
      class: 'sheet',
      'aria-label': 'Text',
      placeholder: 'Write the beginning of a text. The model goes on with it.',
      spellcheck: 'false',
      value: text,
      oninput: () => this.typed(),
      onkeydown: e => this.sheetKey(e),
    });
    this.mirror = h('pre', { class: 'mirror', 'aria-hidden': 'true' });
    this.scores = h('div', { class: 'scores' });
    this.continueButton = h('button', { type: 'button', class: 'small primary', onclick: () => this.goOn() });
    this.sheetMeter = h('span', { class: 'meter' });
    this.undone = [];
    this.thread.replaceChildren(
      h(
        'section',
        { class: 'notebook', 'aria-label': 'Notebook' },
        h('div', { class: 'page-of-text' }, this.mirror, this.sheet),
        this.scores,
        h(
          'div',
          { class: 'tools always' },
          this.continueButton,
          iconButton('undo', 'Undo (Ctrl Z)', () => this.undo()),
          iconButton('chart', 'Token probabilities', () => this.toggleScores(), { 'aria-pressed': 'false' }),
          this.sheetMeter,
        ),
      ),
    );
    this.drawSheet();
  },

  drawSheet() {
    const busy = Boolean(this.answering);
    const text = this.sheet.value;
    const parts = [];
    let at = 0;
    for (const [a, b] of this.current?.written ?? []) {
      parts.push(text.slice(at, a), h('mark', {}, text.slice(a, b)));
      at = b;
    }
    parts.push(text.slice(at), '\n'); // a last line that is empty takes its place too
    this.mirror.replaceChildren(...parts);
    this.continueButton.replaceChildren(icon(busy ? 'stop' : 'send'), busy ? 'Stop' : 'Continue');
    this.continueButton.title = busy ? 'Stop (Escape)' : 'Let the model go on (Ctrl Enter)';
    this.sheet.readOnly = busy;
  },

  // The notebook that is open; one is made when something is first written.
  sheetOf() {
    if (!this.current) {
      this.current = { ...store.newConversation(this.model.id), text: '', written: [] };
      this.conversations.unshift(this.current);
      store.setPreference('current', this.current.id);
    }
    return this.current;
  },

  typed() {
    const book = this.sheetOf();
    this.remember(book, true);
    book.written = moved(book.written, book.text, this.sheet.value);
    this.keep(book, this.sheet.value);
    this.drawSheet();
    this.saveSoon(book);
  },

  keep(book, text) {
    book.text = text;
    if (!book.renamed) book.title = text.trim().replace(/\s+/g, ' ').slice(0, 60);
  },

  // Not with every letter, but before another notebook is opened (history.js).
  saveSoon(book) {
    clearTimeout(this.saving);
    this.unsaved = book;
    this.saving = setTimeout(() => this.saveNow(), 600);
  },

  saveNow() {
    clearTimeout(this.saving);
    const book = this.unsaved;
    this.unsaved = null;
    if (book && this.conversations.includes(book)) this.save(book);
  },

  // A state to come back to; typing without a pause is one.
  remember(book, typing = false) {
    const now = Date.now();
    if (!typing || now - (this.typedAt ?? 0) > 1000) this.undone.push([book.text, book.written]);
    this.typedAt = typing ? now : 0;
  },

  undo() {
    if (this.answering || !this.undone.length) return;
    const book = this.sheetOf();
    const [text, written] = this.undone.pop();
    book.written = written;
    this.keep(book, text);
    this.sheet.value = text;
    this.scores.replaceChildren();
    this.drawSheet();
    this.save(book);
  },

  sheetKey(e) {
    const command = e.ctrlKey || e.metaKey;
    if (command && e.key === 'Enter') (e.preventDefault(), this.goOn());
    else if (command && !e.shiftKey && e.key.toLowerCase() === 'z') (e.preventDefault(), this.undo());
    else if (e.key === 'Tab' && !e.shiftKey && !command && this.sheet.value) {
      e.preventDefault();
      this.sheet.setRangeText('\t', this.sheet.selectionStart, this.sheet.selectionEnd, 'end');
      this.typed();
    }
  },

  toggleScores() {
    const on = !store.preference('scores', false);
    store.setPreference('scores', on);
    this.drawScores();
  },

  drawScores() {
    const on = store.preference('scores', false);
    this.thread.querySelector('[aria-label="Token probabilities"]').setAttribute('aria-pressed', String(on));
    const tokens = this.current?.tokens ?? [];
    this.scores.replaceChildren(...(on && tokens.length ? [tokenView(tokens)] : []));
  },

  async goOn() {
    if (this.answering) return this.stop();
    if (!this.model) return this.loadModels();
    const book = this.sheetOf();
    const before = this.sheet.value;
    this.remember(book);
    this.stick = true;
    const stopper = new AbortController();
    this.answering = { node: null, stopper, conversation: book };
    this.busy(true);
    this.drawSheet();
    const written = [...book.written];
    const last = written.at(-1);
    const from = last && last[1] === before.length ? written.pop()[0] : before.length; // one range goes on
    const show = out => {
      book.text = before + out.content;
      book.written = [...written, [from, book.text.length]];
      if (this.current !== book || this.comparing) return;
      this.sheet.value = book.text;
      this.sheetMeter.textContent = meterText(out.meter);
      this.drawSheet();
    };
    let got = null;
    let problem = '';
    try {
      got = await api.complete({
        model: this.model,
        prompt: before,
        settings: this.settings,
        probabilities: store.preference('probabilities', true),
        signal: stopper.signal,
        update: out => ((got = out), show(out)),
      });
    } catch (error) {
      if (error instanceof api.Unauthorised) this.askKey();
      if (error.name !== 'AbortError') problem = error.message;
    }
    this.answering = null;
    this.busy(false);
    if (got) {
      show(got);
      book.tokens = got.tokens;
    }
    this.keep(book, book.text);
    if (!this.conversations.includes(book)) return; // deleted meanwhile
    await this.save(book);
    if (this.current !== book || this.comparing) return;
    this.drawSheet();
    this.drawScores();
    if (got && !got.content && !problem) problem = 'The model ended the text here.';
    if (problem) this.scores.append(h('p', { class: 'error', role: 'alert' }, problem));
    else if (got?.finish === 'length') this.sheetMeter.textContent += ' · cut off at the limit; Continue goes on';
    this.sheet.focus();
    this.sheet.setSelectionRange(this.sheet.value.length, this.sheet.value.length);
    this.follow();
  },
};
