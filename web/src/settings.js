// Sampling and the rest, as the server's defaults until changed.
import { BASE_TOKENS } from './api.js';
import { h } from './dom.js';
import { preference, setPreference } from './store.js';

export const numbers = [
  ['temperature', 'Temperature', 0, 2, 0.05, '0 always takes the likeliest token'],
  ['top_p', 'Top-p', 0.05, 1, 0.01, 'only the likeliest tokens that together reach this probability'],
  ['top_k', 'Top-k', 0, 200, 1, 'only the k likeliest tokens; 0 is all'],
  ['min_p', 'Min-p', 0, 1, 0.01, 'only tokens at least this likely, relative to the likeliest'],
  ['repetition_penalty', 'Repetition penalty', 0.8, 2, 0.01, 'above 1: less of what was already said'],
];

export const load = () => preference('settings', {});

export function settingsForm(settings, model, changed, { compact = false } = {}) {
  const set = (name, value) => {
    if (value === null || value === '') delete settings[name];
    else settings[name] = value;
    changed();
  };
  const rows = numbers.map(([name, label, low, high, step, help]) => {
    const standard = model?.defaults[name] ?? 0;
    const number = h('input', {
      type: 'number',
      min: low,
      max: high,
      step,
      value: settings[name] ?? standard,
      'aria-label': label,
    });
    const range = h('input', {
      type: 'range',
      min: low,
      max: high,
      step,
      value: settings[name] ?? standard,
      'aria-label': `${label}, slider`,
      tabindex: '-1',
    });
    const reset = h(
      'button',
      {
        type: 'button',
        class: 'reset',
        title: `Server's default: ${standard}`,
        hidden: settings[name] === undefined,
        onclick: () => apply(null),
      },
      'default',
    );
    const apply = value => {
      set(name, value);
      number.value = range.value = value ?? standard;
      reset.hidden = value === null;
    };
    number.addEventListener('change', () =>
      apply(number.value === '' ? null : Math.min(high, Math.max(low, Number(number.value)))),
    );
    range.addEventListener('input', () => apply(Number(range.value)));
    return h('div', { class: 'setting', title: help }, h('label', {}, label), reset, number, range);
  });
  const whole = (name, label, placeholder) => {
    const input = h('input', {
      type: 'number',
      min: name === 'seed' ? 0 : 1,
      step: 1,
      placeholder,
      value: settings[name] ?? '',
      'aria-label': label,
    });
    input.addEventListener('change', () =>
      set(name, input.value === '' ? null : Math.max(name === 'seed' ? 0 : 1, Math.round(Number(input.value)))),
    );
    return h('div', { class: 'setting' }, h('label', {}, label), h('span'), input);
  };
  const base = model && (model.pretrained_only || !model.chat);
  rows.push(whole('max_tokens', 'Most tokens', base ? `${BASE_TOKENS}` : 'no limit'), whole('seed', 'Seed', 'random'));
  if (model?.thinks) {
    const select = h(
      'select',
      { 'aria-label': 'Thinking' },
      [
        ['', 'as the model wants'],
        ['off', 'off'],
        ['low', 'at most 1,024 tokens'],
        ['medium', 'at most 4,096 tokens'],
        ['high', 'no limit'],
      ].map(([v, t]) => h('option', { value: v }, t)),
    );
    select.value = settings.thinking ?? '';
    select.addEventListener('change', () => set('thinking', select.value));
    rows.push(h('div', { class: 'setting' }, h('label', {}, 'Thinking'), h('span'), select));
  }
  const area = (name, label, placeholder, json) => {
    const input = h('textarea', {
      rows: json ? 3 : 4,
      placeholder,
      'aria-label': label,
      spellcheck: json ? 'false' : 'true',
    });
    input.value = settings[name] ?? '';
    const wrong = h('span', { class: 'wrong', role: 'alert' });
    input.addEventListener('change', () => {
      wrong.textContent = '';
      if (json && input.value.trim()) {
        try {
          JSON.parse(input.value);
        } catch {
          wrong.textContent = 'not JSON';
          return;
        }
      }
      set(name, input.value.trim() ? input.value : null);
    });
    return h('div', { class: 'field' }, h('label', {}, label, wrong), input);
  };
  if (base) return h('div', { class: 'settings-form' }, rows); // it knows no system prompt, schema or tools
  const more = [area('system', 'System prompt', 'How the model should behave', false)];
  if (!compact) {
    more.push(
      area('schema', 'Answer follows a JSON schema', '{"type": "object", ...}', true),
      area('tools', 'Tools', '[{"type": "function", "function": {"name": ..., "parameters": {...}}}]', true),
    );
  }
  return h('div', { class: 'settings-form' }, more[0], rows, more.slice(1));
}

export function probabilitiesSwitch(changed) {
  const box = h('input', { type: 'checkbox', id: 'probabilities', checked: preference('probabilities', true) });
  box.addEventListener('change', () => (setPreference('probabilities', box.checked), changed?.()));
  return h(
    'div',
    { class: 'setting check' },
    h('label', { for: 'probabilities' }, 'Ask for token probabilities'),
    h('span'),
    box,
  );
}
