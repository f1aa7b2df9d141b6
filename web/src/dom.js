// Small helpers over the DOM.

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'class') element.className = value;
    else if (name === 'value' || name === 'checked' || name === 'innerHTML' || name === 'hidden' || name === 'disabled')
      element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter(c => c !== null && c !== undefined && c !== false));
  return element;
}

const paths = {
  plus: 'M12 5v14M5 12h14',
  search: 'M11 4a7 7 0 1 0 0 14 7 7 0 0 0 0-14zM20 20l-4-4',
  send: 'M12 20V5M6 11l6-6 6 6',
  stop: 'M7 7h10v10H7z',
  edit: 'M4 20h4L19 9l-4-4L4 16zM14 6l4 4',
  copy: 'M9 9h10v11H9zM5 15V4h10',
  again: 'M4 12a8 8 0 0 1 14-5l2 2M20 4v5h-5M20 12a8 8 0 0 1-14 5l-2-2M4 20v-5h5',
  left: 'M15 5l-7 7 7 7',
  right: 'M9 5l7 7-7 7',
  more: 'M5 12h.01M12 12h.01M19 12h.01',
  tune: 'M4 7h10M18 7h2M4 17h2M10 17h10M14 4v6M6 14v6',
  menu: 'M4 7h16M4 12h16M4 17h16',
  sun:
    'M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2v2M12 20v2M4 12H2M22 12h-2' +
    'M5 5l1.5 1.5M17.5 17.5L19 19M5 19l1.5-1.5M17.5 6.5L19 5',
  moon: 'M20 14A8 8 0 1 1 10 4a7 7 0 0 0 10 10z',
  split: 'M4 5h7v14H4zM13 5h7v14h-7z',
  trash: 'M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13',
  download: 'M12 4v11M7 11l5 5 5-5M5 20h14',
  upload: 'M12 16V5M7 9l5-5 5 5M5 20h14',
  close: 'M6 6l12 12M18 6L6 18',
  undo: 'M9 7L4 12l5 5M4 12h10a6 6 0 0 1 0 12',
  down: 'M12 5v13M6 12l6 6 6-6',
  chart: 'M5 20V11M12 20V4M19 20v-6',
  help: 'M9 9a3 3 0 1 1 4 3c-1 .5-1 1-1 2M12 17.5h.01',
};

export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  const path = document.createElementNS('http://www.w3.org/2000/svg', 'path');
  path.setAttribute('d', paths[name]);
  svg.append(path);
  return svg;
}

export const iconButton = (name, label, onclick, more = {}) =>
  h('button', { type: 'button', class: 'icon', 'aria-label': label, title: label, onclick, ...more }, icon(name));

let toastTimer;
// A short message, with something to do about it: [label, action].
export function toast(message, action = null) {
  let element = document.querySelector('#toast');
  if (!element) document.body.append((element = h('div', { id: 'toast', role: 'status' })));
  const button = action && h('button', { type: 'button', class: 'small' }, action[0]);
  button?.addEventListener('click', () => (element.classList.remove('shown'), action[1]()));
  element.replaceChildren(message, ...(button ? [button] : []));
  element.classList.add('shown');
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => element.classList.remove('shown'), action ? 10000 : 4000);
}

// A modal dialog; closes on Escape and on a click outside it.
export function dialog(title, body, actions = []) {
  const element = h(
    'dialog',
    { 'aria-label': title },
    h('h2', {}, title),
    body,
    h(
      'div',
      { class: 'actions' },
      actions.map(a => a(() => element.close())),
    ),
  );
  element.addEventListener('close', () => element.remove());
  element.addEventListener('click', e => e.target === element && element.close());
  document.body.append(element);
  element.showModal();
  return element;
}

export function download(name, type, text) {
  const link = h('a', { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    if (button) {
      const before = button.textContent;
      button.textContent = 'Copied';
      setTimeout(() => (button.textContent = before), 1500);
    } else toast('Copied');
  } catch {
    toast('The browser did not allow copying.');
  }
}

export const percent = logprob => {
  const p = Math.exp(logprob) * 100;
  return p >= 99.95 ? '100%' : p >= 10 ? `${p.toFixed(0)}%` : p >= 0.1 ? `${p.toFixed(1)}%` : '<0.1%';
};
export const visible = token => token.replaceAll('\n', '⏎').replaceAll('\t', '⇥').replaceAll(' ', '·') || '∅';
