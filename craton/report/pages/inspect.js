const $ = id => document.getElementById(id);
const data = JSON.parse($('data').textContent);
const size = data.tokens.length;
const CELL = 13; // pixels of the attention map that a pair of tokens takes
const MARGIN = 92; // and the names of tokens beside it

const shown = text =>
  (text.trim() ? text : text.replace(/ /g, '\u2423')).replace(/\n/g, '\u21b5').replace(/\t/g, '\u21e5') || '\u2205';
const quoted = text => `\u201c${shown(text)}\u201d`;
const tint = alpha => `rgba(var(--hue), ${alpha.toFixed(3)})`;

function element(name, text = '', className = '') {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

let chosen = size - 1;
function choose(token) {
  chosen = token;
  draw();
}

// ---- made once ----

data.tokens.forEach((text, i) => {
  const button = element('button', shown(text), 't');
  const probability = data.probability[i];
  if (probability !== null) {
    button.style.background = tint(Math.min(0.6, -Math.log2(Math.max(probability, 1e-5)) / 18));
    button.title = `probability ${probability}`;
  }
  button.onclick = () => choose(i);
  $('tokens').append(button);
  if (text.includes('\n')) $('tokens').append(element('br'));
});

const mostEntropy = Math.max(...data.entropy, 1);
$('most').textContent = `${mostEntropy.toFixed(1)} bits`;
data.entropy.forEach((bits, i) => {
  const column = element('i');
  column.style.height = `${100 * bits / mostEntropy}%`;
  column.title = `${shown(data.tokens[i])}: ${bits}`;
  column.onclick = () => choose(i);
  $('entropy').append(column);
});

for (let i = 0; i < data.attention.length; i++) $('layer').add(new Option(i + 1, i));
$('head').add(new Option('mean', -1));
for (let i = 0; i < data.heads; i++) $('head').add(new Option(i + 1, i));
$('layer').value = data.attention.length - 1;
$('head').value = -1;
$('layer').onchange = $('head').onchange = draw;

data.lens.forEach((row, layer) => {
  const line = $('lens').insertRow();
  line.append(element('th', `layer ${layer + 1}`));
  row.forEach(([text, probability]) => {
    const cell = line.insertCell();
    cell.textContent = shown(text);
    cell.title = probability;
    cell.style.background = tint(probability * 0.55);
  });
});
const headings = $('lens').createTHead().insertRow();
headings.append(element('th', 'after'));
data.tokens.forEach(text => headings.append(element('th', shown(text), 'column')));

// ---- attention ----

const maps = data.attention.map(text => Uint8Array.from(atob(text), c => c.charCodeAt(0)));

/** Share of head (of all heads on average: -1) that token `from` gives to token `to`, from 0 to 1. */
function attention(layer, head, from, to) {
  const of = h => maps[layer][(h * size + from) * size + to] / 255;
  if (head >= 0) return of(head);
  let sum = 0;
  for (let h = 0; h < data.heads; h++) sum += of(h);
  return sum / data.heads;
}

/** The tokens along both sides of the map. */
function names(pen) {
  pen.font = '10px ui-monospace, monospace';
  pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('--soft');
  pen.textBaseline = 'middle';
  data.tokens.forEach((text, i) => {
    const name = [...shown(text)].slice(0, 13).join('');
    const middle = MARGIN + i * CELL + CELL / 2;
    pen.textAlign = 'right';
    pen.fillText(name, MARGIN - 5, middle);
    pen.save();
    pen.translate(middle, MARGIN - 5);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = 'left';
    pen.fillText(name, 0, 0);
    pen.restore();
  });
}

function drawMap() {
  const canvas = $('map'), layer = +$('layer').value, head = +$('head').value;
  const side = MARGIN + size * CELL;
  const scale = devicePixelRatio || 1;
  canvas.width = canvas.height = side * scale;
  canvas.style.width = canvas.style.height = `${side}px`;
  if (!maps.length) return;
  const pen = canvas.getContext('2d');
  pen.scale(scale, scale);
  names(pen);
  pen.translate(MARGIN, MARGIN);
  const hue = getComputedStyle(document.documentElement).getPropertyValue('--hue');
  for (let from = 0; from < size; from++) {
    for (let to = 0; to <= from; to++) {
      pen.fillStyle = `rgba(${hue}, ${Math.sqrt(attention(layer, head, from, to))})`;
      pen.fillRect(to * CELL, from * CELL, CELL, CELL);
    }
  }
  pen.strokeStyle = `rgb(${hue})`;
  pen.strokeRect(0.5, chosen * CELL + 0.5, (chosen + 1) * CELL - 1, CELL - 1);
  const best = Array.from({ length: chosen + 1 }, (_, to) => [attention(layer, head, chosen, to), to]);
  best.sort((a, b) => b[0] - a[0]);
  const words = best.slice(0, 4).map(([share, to]) => `${quoted(data.tokens[to])} ${(share * 100).toFixed(0)} %`);
  $('where').textContent = `${quoted(data.tokens[chosen])} looks at ${words.join(', ')}`;
  $('looks').replaceChildren(...best.slice(0, 12).map(([share, to]) => bar([data.tokens[to], share])));
  canvas.onmousemove = event => {
    const box = canvas.getBoundingClientRect();
    const to = Math.floor((event.clientX - box.left - MARGIN) / CELL);
    const from = Math.floor((event.clientY - box.top - MARGIN) / CELL);
    if (to < 0 || from < 0 || to > from || from >= size) return;
    const share = (attention(layer, head, from, to) * 100).toFixed(1);
    $('where').textContent = `${quoted(data.tokens[from])} to ${quoted(data.tokens[to])}: ${share} %`;
  };
}

// ---- what follows the choice ----

function bar([text, probability]) {
  const row = element('div', '', 'bar'), fill = element('i');
  fill.style.width = `${probability * 100}%`;
  row.append(element('span', shown(text)), fill, element('span', probability.toFixed(3)));
  return row;
}

function draw() {
  document.querySelectorAll('.t').forEach((b, i) => b.setAttribute('aria-pressed', i === chosen));
  document.querySelectorAll('#entropy i').forEach((c, i) => c.classList.toggle('chosen', i === chosen));
  let next = `after ${quoted(data.tokens[chosen])}, entropy ${data.entropy[chosen]} bits`;
  if (chosen + 1 < size) {
    next += `; the text goes on with ${quoted(data.tokens[chosen + 1])} (${data.probability[chosen + 1]})`;
  }
  $('next').textContent = next;
  $('top').replaceChildren(...data.top[chosen].map(bar));
  drawMap();
}
draw();
