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
draw();
