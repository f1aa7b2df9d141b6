// How one message looks: text, thinking, tool calls, token probabilities, the meter.
import { copy, h, icon, iconButton, percent, visible } from './dom.js';
import { render } from './render.js';

// What people wrote is shown as they wrote it.
export const said = text => h('div', { class: 'bubble' }, text);

// context: how many tokens the model can hold, to say how full it is.
export function meterText(meter, context = 0) {
  if (!meter) return '';
  const parts = [];
  if (meter.tokens !== null) parts.push(`${meter.tokens} tokens`);
  if (meter.rate !== null && meter.tokens > 1)
    parts.push(`${meter.rate < 100 ? meter.rate.toFixed(1) : meter.rate.toFixed(0)} tok/s`);
  if (meter.first !== null)
    parts.push(`first after ${meter.first < 10 ? meter.first.toFixed(2) : meter.first.toFixed(0)} s`);
  if (meter.prompt !== null) parts.push(`prompt ${meter.prompt}${meter.cached ? ` (${meter.cached} cached)` : ''}`);
  if (meter.prompt !== null && context) {
    const full = (100 * (meter.prompt + (meter.tokens ?? 0))) / context;
    if (full >= 1) parts.push(`${full.toFixed(0)} % of the context`);
  }
  if (meter.reasoning) parts.push(`${meter.reasoning} thinking`);
  return parts.join(' · ');
}

// Tokens shaded by how sure the model was; the alternatives on hover, focus or touch.
export function tokenView(tokens) {
  const box = h('div', {
    class: 'tokens',
    role: 'group',
    'aria-label': 'Tokens with their probabilities; arrow keys move',
  });
  tokens.forEach(([text, logprob], i) => {
    const bits = Math.min(1, -logprob / Math.LN2 / 10); // surprise: ten bits is as dark as it gets
    box.append(
      h(
        'span',
        {
          class: 'token',
          'data-i': i,
          tabindex: i ? '-1' : '0',
          style: `--doubt:${bits.toFixed(3)}`,
          'aria-label': `${text}, ${percent(logprob)}`,
        },
        text,
      ),
    );
  });
  const tip = h('div', { class: 'tip', role: 'tooltip', hidden: true });
  const show = span => {
    const [text, logprob, top] = tokens[Number(span.dataset.i)];
    const rows = top.some(([t]) => t === text) ? top : [[text, logprob], ...top];
    tip.replaceChildren(
      ...rows.map(([t, p]) =>
        h(
          'div',
          { class: t === text ? 'row chosen' : 'row' },
          h('code', {}, visible(t)),
          h('span', { class: 'bar' }, h('i', { style: `width:${Math.max(1, Math.exp(p) * 100)}%` })),
          h('span', { class: 'p' }, percent(p)),
        ),
      ),
    );
    tip.hidden = false;
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const base = box.getBoundingClientRect();
    tip.style.left = `${Math.max(0, Math.min(at.left - base.left, base.width - 240))}px`;
    tip.style.top = `${at.bottom - base.top + 6}px`;
  };
  const hide = () => (tip.hidden = true);
  box.addEventListener('pointerover', e => e.target.classList.contains('token') && show(e.target));
  box.addEventListener('pointerleave', hide);
  box.addEventListener('focusin', e => e.target.classList.contains('token') && show(e.target));
  box.addEventListener('focusout', hide);
  box.addEventListener('keydown', e => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    if (!step || !e.target.classList.contains('token')) return;
    const next = box.querySelector(`[data-i="${Number(e.target.dataset.i) + step}"]`);
    if (next) {
      e.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      e.preventDefault();
    }
  });
  box.append(tip);
  return box;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

export function callView(call, onResult) {
  const box = h(
    'div',
    { class: 'call' },
    h('div', { class: 'call-head' }, icon('tune'), h('b', {}, call.name), h('span', {}, 'tool call')),
    h('pre', {}, pretty(call.arguments)),
  );
  if (call.result !== null && call.result !== undefined)
    box.append(h('div', { class: 'call-result' }, h('span', {}, 'Result'), h('pre', {}, call.result)));
  else if (onResult) {
    const input = h('textarea', {
      rows: '2',
      'aria-label': `Result of ${call.name}`,
      placeholder: 'What the tool answered',
    });
    box.append(
      h(
        'form',
        { class: 'call-form', onsubmit: e => (e.preventDefault(), onResult(input.value)) },
        input,
        h('button', { class: 'small', type: 'submit' }, 'Give result'),
      ),
    );
  }
  return box;
}

// The body of an answer; called again and again while it grows.
export function fillAnswer(box, node, { streaming = false, asTokens = false, onResult = null, onContinue = null } = {}) {
  const parts = [];
  if (node.reasoning) {
    const open = box.querySelector('details.thinking')?.open ?? false;
    const busy = streaming && !node.content && !(node.calls ?? []).length;
    parts.push(
      h(
        'details',
        { class: 'thinking', open },
        h('summary', {}, busy ? 'Thinking…' : 'Thought before answering'),
        h('div', { class: 'thought', innerHTML: render(node.reasoning) }),
      ),
    );
  }
  if (asTokens && node.tokens?.length) parts.push(tokenView(node.tokens));
  else if (node.content) parts.push(h('div', { class: 'prose', innerHTML: render(node.content) }));
  for (const call of node.calls ?? [])
    parts.push(callView(call, streaming || !onResult ? null : text => onResult(call, text)));
  if (streaming && !node.content && !node.reasoning && !(node.calls ?? []).length)
    parts.push(h('div', { class: 'waiting', 'aria-label': 'Waiting for the first token' }, h('i'), h('i'), h('i')));
  if (node.error) parts.push(h('p', { class: 'error', role: 'alert' }, node.error));
  if (node.finish === 'length' && !streaming)
    parts.push(
      h(
        'p',
        { class: 'note' },
        'Cut off at the limit of tokens. ',
        onContinue && h('button', { type: 'button', class: 'small', onclick: onContinue }, 'Continue'),
      ),
    );
  if (node.stopped) parts.push(h('p', { class: 'note' }, 'Stopped.'));
  box.replaceChildren(...parts);
}

export function wireCopy(root) {
  root.addEventListener('click', e => {
    const button = e.target.closest('[data-copy]');
    if (button) copy(button.closest('.code').querySelector('code').textContent, button);
  });
}

export { iconButton };
