"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const PAGE = 30;
let shown = PAGE;

function element(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function svg(kind, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawCurve(box) {
  const points = JSON.parse(box.dataset.points);
  const most = Math.max(...points.map((p) => p[2]));
  const [x, y] = [(v) => 34 + 190 * v, (v) => 165 - 155 * v];
  const all = svg("svg", {viewBox: "0 0 240 200"});
  for (const v of [0, 0.5, 1]) {
    all.append(svg("line", {x1: x(0), x2: x(1), y1: y(v), y2: y(v), class: "grid"}));
    all.append(svg("text", {x: x(0) - 6, y: y(v) + 3, "text-anchor": "end"}, String(v)));
    all.append(svg("text", {x: x(v), y: y(0) + 14, "text-anchor": "middle"}, String(v)));
  }
  all.append(svg("line", {x1: x(0), y1: y(0), x2: x(1), y2: y(1), class: "ideal"}));
  all.append(svg("polyline", {points: points.map((p) => `${x(p[0])},${y(p[1])}`).join(" "), class: "line"}));
  for (const [sure, right, n] of points) {
    const dot = svg("circle", {cx: x(sure), cy: y(right), r: 1.5 + 4 * Math.sqrt(n / most), class: "dot"});
    dot.append(svg("title", {}, `${n} items: ${sure.toFixed(2)} sure, ${right.toFixed(2)} right`));
    all.append(dot);
  }
  all.append(svg("text", {x: x(0.5), y: 196, "text-anchor": "middle"}, "how sure it was; how often it was right"));
  box.append(all);
}

function verdict(item) {
  if (item.score === 1) return ["right", "right"];
  return item.score === 0 ? ["wrong", "wrong"] : [`score ${item.score.toFixed(3)}`, "wrong"];
}

function isCut(item) {
  return item.finish === "length" || (item.choices.length === 0 && !item.parsed);
}

function wanted(item, other) {
  const show = at("show").value;
  if (show === "right" && item.score < 1) return false;
  if (show === "wrong" && item.score >= 1) return false;
  if (show === "cut" && !isCut(item)) return false;
  if (show === "differ" && (!other || other.score === item.score)) return false;
  const words = at("words").value.toLowerCase();
  return !words || JSON.stringify(item).toLowerCase().includes(words);
}

function answerOf(item, model) {
  const box = element("div");
  const head = element("header");
  const [text, name] = verdict(item);
  head.append(element("span", text, name), element("span", data.models[model]));
  if (item.finish === "length") head.append(element("span", "cut", "wrong"));
  if (item.note) head.append(element("span", item.note));
  box.append(head);
  if (item.choices.length > 0 && item.ll.length > 1) {
    const list = element("ul");
    item.choices.forEach((choice, i) => {
      const line = element("li", undefined, (i === item.target ? "gold " : "") + (i === item.answer ? "picked" : ""));
      line.append(element("span", item.ll[i].toFixed(2), "ll"), document.createTextNode(choice));
      list.append(line);
    });
    box.append(list);
  } else {
    box.append(element("pre", item.answer === null ? "(another continuation is likelier)" : String(item.answer)));
  }
  return box;
}

function draw() {
  const first = Number(at("model").value);
  const beside = at("beside") && at("beside").value !== "" ? Number(at("beside").value) : null;
  const all = data.items[at("task").value];
  const found = [];
  all[first].forEach((item, i) => {
    const other = beside === null ? null : all[beside][i];
    if (wanted(item, other)) found.push([item, other]);
  });
  at("count").textContent = `${found.length} of ${all[first].length}`;
  const box = at("items");
  box.replaceChildren();
  for (const [item, other] of found.slice(0, shown)) {
    const card = element("div", undefined, "card item");
    const head = element("header");
    head.append(element("span", `#${item.id}`));
    if (item.group) head.append(element("span", item.group));
    if (item.ll.length < 2) {
      head.append(element("span", `wanted: ${Array.isArray(item.target) ? item.target.slice(0, 5).join(" / ") : item.target}`));
    }
    card.append(head, element("pre", item.prompt));
    const answers = element("div", undefined, "answers");
    answers.append(answerOf(item, first));
    if (other) answers.append(answerOf(other, beside));
    card.append(answers);
    box.append(card);
  }
  at("more").hidden = found.length <= shown;
}

for (const id of ["task", "model", "beside", "show", "words"]) {
  if (at(id)) at(id).addEventListener("input", () => { shown = PAGE; draw(); });
}
at("more").addEventListener("click", () => { shown += PAGE; draw(); });
document.querySelectorAll(".curve").forEach(drawCurve);
draw();
