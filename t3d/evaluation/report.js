"use strict";
// The report's tables sort, and its answers are browsed. Texts of models reach the page through textContent alone.

// A cell's value for sorting: its first number, or its text.
function valueOf(cell) {
  const text = cell.textContent.trim(), number = /-?\d[\d,]*(\.\d+)?/.exec(text);
  return cell.classList.contains("num") && number ? Number(number[0].replaceAll(",", "")) : text.toLowerCase();
}

function sort(head) {
  const up = head.getAttribute("aria-sort") !== "ascending", body = head.closest("table").tBodies[0];
  const column = head.cellIndex, empty = (row) => row.cells[column].textContent.trim() === "";
  const rows = [...body.rows].sort((a, b) => {
    if (empty(a) || empty(b)) return empty(a) - empty(b);
    const x = valueOf(a.cells[column]), y = valueOf(b.cells[column]);
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
  });
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  for (const row of rows) row.classList.remove("new");
  body.append(...rows);
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sort(button.parentNode));

// ---------------------------------------------------------------------------------------------------------------------
// Answers

const PAGE = 20;
const byId = (id) => document.getElementById(id);
const element = (tag, text, name) => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (name) made.className = name;
  return made;
};

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// What A and B make of a question: name -> test.
const FILTERS = {
  "A right, B wrong": (a, b) => a[2] && !b[2],
  "A wrong, B right": (a, b) => !a[2] && b[2],
  "both wrong": (a, b) => !a[2] && !b[2],
  "both right": (a, b) => a[2] && b[2],
};
const ALONE = { "wrong": (a) => !a[2], "right": (a) => a[2] };

function browse({ sets, questions }) {
  let shown = PAGE;
  const select = (id) => byId(id).value;

  function fill(id, values, chosen) {
    byId(id).replaceChildren(...values.map(([value, text]) => {
      const option = element("option", text);
      option.value = value;
      return option;
    }));
    if (chosen !== undefined) byId(id).value = chosen;
  }

  // The other sets of A's data set, the last of them first: another method at its fastest.
  function others() {
    const a = Number(select("a"));
    const found = sets.map((set, i) => [i, set.name]).filter(([i]) => i !== a && sets[i].dataset === sets[a].dataset);
    fill("b", [...found, ["", "nothing"]], found.length ? found.at(-1)[0] : "");
    count();
  }

  function pairs() {
    const a = Number(select("a")), b = select("b") === "" ? null : Number(select("b"));
    const both = questions.map((one) => [one, one.answers[a], b === null ? null : one.answers[b]]);
    return both.filter(([, first, second]) => first && (b === null || second));
  }

  function filters() { return select("b") === "" ? ALONE : FILTERS; }

  function count() {
    const found = pairs(), names = Object.entries(filters());
    const counts = names.map(([name, test]) => [name, `${name}: ${found.filter(([, a, b]) => test(a, b)).length}`]);
    fill("filter", [...counts, ["", `all: ${found.length}`]]);
    const right = (side) => `${(100 * found.filter((pair) => pair[side][2]).length / found.length).toFixed(1)} %`;
    const only = names.map(([name, test]) => found.filter(([, a, b]) => test(a, b)).length);
    byId("sum").textContent = !found.length ? "No question in common."
      : select("b") === "" ? `${right(1)} of ${found.length} answers are right.`
      : `Right answers to ${found.length} questions: A ${right(1)}, B ${right(2)}. Only A is right on ${only[0]}, only B on ${only[1]}.`;
    list();
  }

  function matches([one, a, b]) {
    const words = select("search").toLowerCase().split(/\s+/).filter(Boolean);
    const text = [one.id, one.question, one.truth, a[0], a[1], b && b[0], b && b[1]].join("\n").toLowerCase();
    return words.every((word) => text.includes(word));
  }

  function list() {
    const test = filters()[select("filter")];
    let found = pairs().filter(([, a, b]) => !test || test(a, b)).filter(matches);
    if (!test) {  // all: in the order of the filters
      const tests = Object.values(filters());
      const rank = ([, a, b]) => tests.findIndex((one) => one(a, b));
      found = found.map((pair) => [rank(pair), pair]).sort((x, y) => x[0] - y[0]).map(([, pair]) => pair);
    }
    byId("found").textContent = `${found.length} question${found.length === 1 ? "" : "s"}`;
    byId("cards").replaceChildren(...found.slice(0, shown).map(card));
    byId("more").hidden = found.length <= shown;
  }

  function card([one, a, b]) {
    const made = element("article", "");
    made.append(element("p", one.question, "asked"), element("p", `right answer: ${one.truth || "–"}`, "facts"));
    const sides = element("div", "", "sides");
    sides.append(side(`A: ${sets[Number(select("a"))].name}`, a));
    if (b) sides.append(side(`B: ${sets[Number(select("b"))].name}`, b));
    made.append(sides);
    const rest = one.answers.map((answer, i) => [sets[i].name, answer]).filter(([, answer]) => answer && answer !== a && answer !== b);
    if (rest.length) {
      const more = element("details", "");
      more.append(element("summary", `${rest.length} other answer${rest.length > 1 ? "s" : ""}, ${rest.filter(([, x]) => x[2]).length} right`));
      more.append(...rest.map(([name, answer]) => side(name, answer)));
      made.append(more);
    }
    return made;
  }

  function side(name, [text, said, right, tokens, forwards]) {
    const made = element("div", "", "side");
    const facts = element("p", "", "facts");
    facts.append(element("b", right ? "✓ right" : "✗ wrong", right ? "yes" : "no"));
    facts.append(` · ${name} · answer ${said ?? "not found"} · ${tokens} tokens, ${forwards} forwards`);
    made.append(facts, element("p", text, "text"));
    return made;
  }

  fill("a", sets.map((set, i) => [i, set.name]));
  others();
  const again = (render) => () => { shown = PAGE; render(); };
  byId("a").addEventListener("change", again(others));
  byId("b").addEventListener("change", again(count));
  byId("filter").addEventListener("change", again(list));
  byId("search").addEventListener("input", again(list));
  byId("more").addEventListener("click", () => { shown += PAGE; list(); });
  byId("answers").hidden = false;
}

const packed = byId("packed");
if (packed) unpack(packed.textContent).then(browse);
