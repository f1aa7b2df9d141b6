// The conversation that is open: its messages, drawn, edited, made again. Methods of App (main.js).

import * as api from './api.js';
import { copy, h, iconButton, toast } from './dom.js';
import { fillAnswer, meterText, said } from './message.js';
import * as store from './store.js';

export const thread = {
  draw() {
    if (this.comparing) return;
    document.body.classList.toggle('writing', Boolean(this.isNotebook));
    if (this.isNotebook) return this.drawNotebook();
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
  },

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
        said(node.content),
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
          h('span', { class: 'meter' }, meterText(node.meter, this.models.find(m => m.id === node.model)?.context_length)),
        ),
      busy && h('div', { class: 'tools' }, h('span', { class: 'live' })),
    );
  },

  fill(box, node) {
    const last = this.current && this.current.leaf === node.id;
    fillAnswer(box, node, {
      streaming: this.answering?.node === node,
      asTokens: this.tokensShown.has(node.id),
      onResult: last ? (call, text) => this.giveResult(node, call, text) : null,
      onContinue: last && node.content && !this.answering ? () => this.goOnWith(node) : null,
    });
  },

  redraw(node) {
    const old = this.thread.querySelector(`[data-id="${node.id}"]`);
    old?.replaceWith(this.drawNode(node));
  },

  show(node) {
    this.current.leaf = store.newestLeaf(this.current, node.id);
    this.save();
    this.draw();
  },

  cut(node) {
    const conversation = this.current;
    const before = { nodes: { ...conversation.nodes }, leaf: conversation.leaf };
    store.removeSubtree(conversation, node.id);
    const end = conversation.leaf;
    this.save();
    this.draw();
    const undo = () => {
      conversation.nodes = { ...before.nodes, ...conversation.nodes }; // what was said since stays, on its own branch
      if (conversation.leaf === end) conversation.leaf = before.leaf;
      this.save(conversation);
      if (this.current === conversation) this.draw();
    };
    toast('Deleted from there on.', ['Undo', undo]);
  },

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
      const text = area.value;
      if (!text.trim() || text === node.content) return cancel();
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
  },

  // Let an answer that was cut off go on.
  goOnWith(node) {
    if (!this.answering) this.answer(node);
  },

  regenerate(node) {
    this.current.leaf = node.parent;
    this.answer();
  },

  giveResult(node, call, text) {
    if (this.answering) return;
    call.result = text;
    if (node.calls.some(c => c.result === null)) return this.redraw(node);
    this.answer();
  },
};
