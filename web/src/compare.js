// Two models or settings side by side. Who is who is hidden until the vote, which is stored here and on the server.
import * as api from './api.js';
import { dialog, download, h, icon, iconButton, toast } from './dom.js';
import { fillAnswer, meterText, said } from './message.js';
import { settingsForm } from './settings.js';
import * as store from './store.js';

export class Compare {
  constructor(app) {
    this.app = app;
    const saved = store.preference('contenders', null);
    this.contenders = saved ?? [{ settings: {} }, { settings: {} }];
    this.rounds = [];
    this.stopper = null;
  }

  // Rounds of before, as they were left; what was still being answered then is not.
  async load() {
    const kept = (await store.all('rounds')).find(r => r.id === 'current');
    this.rounds = (kept?.rounds ?? []).filter(r => r.sides.every(s => s.done));
  }

  keep() {
    return store.put('rounds', { id: 'current', rounds: this.rounds });
  }

  model(i) {
    return (
      this.app.models.find(m => m.id === this.contenders[i].model) ??
      this.app.models[Math.min(i, this.app.models.length - 1)]
    );
  }

  view() {
    this.thread = h('div', { class: 'rounds' });
    this.setup = h('div', { class: 'contenders' });
    this.drawSetup();
    this.draw();
    return h('section', { class: 'compare', 'aria-label': 'Side by side' }, this.setup, this.thread);
  }

  drawSetup() {
    this.setup.replaceChildren(
      ...this.contenders.map((c, i) => {
        const pick = h(
          'select',
          { 'aria-label': `Contender ${i + 1}: model` },
          this.app.models.map(m => h('option', { value: m.id }, m.id)),
        );
        pick.value = this.model(i)?.id ?? '';
        pick.addEventListener('change', () => ((c.model = pick.value), this.save(), this.drawSetup()));
        const changed = Object.keys(c.settings).length;
        return h(
          'div',
          { class: 'contender' },
          pick,
          h(
            'button',
            { type: 'button', class: 'small', onclick: () => this.edit(i) },
            icon('tune'),
            changed ? `${changed} changed` : 'Settings',
          ),
        );
      }),
      h(
        'div',
        { class: 'contender-actions' },
        iconButton('trash', 'Start over', () => this.clear()),
        h('button', { type: 'button', class: 'small', onclick: () => this.exportVotes() }, icon('download'), 'Votes'),
      ),
    );
  }

  save() {
    store.setPreference('contenders', this.contenders);
  }

  edit(i) {
    dialog(
      `Contender ${i + 1}`,
      settingsForm(this.contenders[i].settings, this.model(i), () => (this.save(), this.drawSetup()), {
        compact: true,
      }),
      [close => h('button', { type: 'button', class: 'primary', onclick: close }, 'Done')],
    );
  }

  clear() {
    this.stopper?.abort();
    const before = this.rounds;
    this.rounds = [];
    this.draw();
    this.keep();
    if (before.length) toast('Started over.', ['Undo', () => ((this.rounds = before), this.draw(), this.keep())]);
  }

  async exportVotes() {
    const votes = await store.all('votes');
    if (!votes.length) return toast('No votes yet.');
    download('votes.jsonl', 'application/jsonl', votes.map(v => JSON.stringify(v)).join('\n') + '\n');
  }

  // Both go on from the answer that was preferred, so that a vote compares answers to the same conversation.
  messages(round) {
    const before = this.rounds.slice(0, this.rounds.indexOf(round)).flatMap(r => [
      { role: 'user', content: r.question },
      { role: 'assistant', content: r.sides[r.vote === 'right' ? 1 : 0].content },
    ]);
    return [...before, { role: 'user', content: round.question }];
  }

  async ask(question) {
    const first = Math.random() < 0.5 ? 0 : 1; // which contender is on the left
    const round = {
      question,
      order: [first, 1 - first],
      sides: [0, 1].map(() => ({ content: '', reasoning: '', calls: [], tokens: [] })),
      vote: null,
    };
    this.rounds.push(round);
    // As they are now: pickers and earlier votes may change before this one is cast.
    round.asked = [0, 1].map(i => ({
      model: this.model(i).id,
      settings: structuredClone(this.contenders[i].settings),
    }));
    round.messages = this.messages(round);
    this.stopper = new AbortController();
    this.app.busy(true);
    this.app.stick = true;
    this.draw();
    await Promise.all(
      [0, 1].map(async place => {
        const who = round.order[place];
        const side = round.sides[place];
        try {
          Object.assign(
            side,
            await api.answer({
              model: this.model(who),
              messages: round.messages,
              settings: round.asked[who].settings,
              probabilities: false,
              signal: this.stopper.signal,
              update: out => (
                Object.assign(side, { content: out.content, reasoning: out.reasoning, calls: out.calls }),
                this.drawSide(round, place, true)
              ),
            }),
          );
        } catch (error) {
          if (error instanceof api.Unauthorised) this.app.askKey();
          if (error.name === 'AbortError') side.stopped = true;
          else side.error = error.message;
        }
        side.done = true;
        this.drawSide(round, place, false);
      }),
    );
    this.stopper = null;
    this.app.busy(false);
    this.draw();
    this.app.follow();
    await this.keep();
  }

  stop() {
    this.stopper?.abort();
  }

  drawSide(round, place, streaming) {
    const box = this.thread.querySelector(
      `[data-round="${this.rounds.indexOf(round)}"][data-place="${place}"] .answer`,
    );
    if (box) fillAnswer(box, round.sides[place], { streaming });
    this.app.follow();
  }

  draw() {
    if (!this.rounds.length) {
      this.thread.replaceChildren(
        h(
          'div',
          { class: 'empty' },
          icon('split'),
          h('h1', {}, 'Side by side, blind'),
          h(
            'p',
            {},
            'Pick two models, or one with different settings. Both answer; you vote before you learn which was which.',
          ),
        ),
      );
      return;
    }
    this.thread.replaceChildren(...this.rounds.map((round, r) => this.drawRound(round, r)));
    this.rounds.forEach(round => round.sides.forEach((s, place) => this.drawSide(round, place, !s.done)));
  }

  drawRound(round, r) {
    const done = round.sides.every(s => s.done);
    const sides = [0, 1].map(place => {
      const who = round.order[place];
      const name = round.vote ? this.describe(round, who) : place ? 'B' : 'A';
      return h(
        'article',
        {
          class: `side${round.vote === (place ? 'right' : 'left') ? ' won' : ''}`,
          'data-round': r,
          'data-place': place,
          'aria-label': `Answer ${place ? 'B' : 'A'}`,
        },
        h(
          'header',
          {},
          h('b', {}, name),
          round.vote && h('span', { class: 'meter' }, meterText(round.sides[place].meter)),
        ),
        h('div', { class: 'answer' }),
      );
    });
    const failed = round.sides.some(s => s.error);
    const votes =
      done &&
      !round.vote &&
      !failed &&
      h(
        'div',
        { class: 'vote', role: 'group', 'aria-label': 'Which answer is better?' },
        [
          ['left', 'A is better'],
          ['tie', 'Both good'],
          ['neither', 'Neither'],
          ['right', 'B is better'],
        ].map(([v, text]) => h('button', { type: 'button', onclick: () => this.vote(round, v) }, text)),
      );
    return h(
      'section',
      { class: 'round' },
      h('div', { class: 'message user' }, said(round.question)),
      h('div', { class: 'sides' }, sides),
      votes,
    );
  }

  describe(round, who) {
    const c = round.asked[who];
    const changes = Object.entries(c.settings)
      .filter(([k]) => k !== 'system')
      .map(([k, v]) => `${k} ${v}`);
    return [c.model, ...changes, ...(c.settings.system ? ['own system prompt'] : [])].join(', ');
  }

  async vote(round, choice) {
    round.vote = choice;
    const record = {
      messages: round.messages,
      left: { ...round.asked[round.order[0]], text: round.sides[0].content },
      right: { ...round.asked[round.order[1]], text: round.sides[1].content },
      vote: choice,
    };
    this.draw();
    await this.keep();
    await store.put('votes', { id: store.newId(), time: Date.now(), ...record });
    try {
      await api.vote(record);
    } catch (error) {
      toast(`Kept in this browser only: ${error.message}`);
    }
  }
}
