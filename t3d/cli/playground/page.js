"use strict";
// The playground's page. The server sends frames (t3d/cli/playground/answers.py); this file draws them.
// Text of models and of links reaches the page through textContent and value alone.

const $ = (id) => document.getElementById(id);
const MASK = "░";
const MOST = 3e7;  // cells of the table that compares two answers
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
let setup = null;
let panes = [];
let began = 0;  // when the panes were asked; 0 = no answer is on its way
let round = 0;  // counts questions, so that a stopped one changes nothing afterwards

function option(value) {
  const item = document.createElement("option");
  item.value = item.textContent = value;
  return item;
}

// The colour of the rank-th step (from 1) of a block: [background, text]. An earlier step is darker.
function colour(rank, size) {
  const x = Math.min((rank - 1) / Math.max(size - 1, 1), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(x), VIRIDIS.length - 2);
  const rgb = VIRIDIS[i].map((low, c) => Math.round(low + (x - i) * (VIRIDIS[i + 1][c] - low)));
  const light = 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2] > 140;
  return [`rgb(${rgb})`, light ? "#000" : "#fff"];
}

// ---------------------------------------------------------------------------------------------------------------------
// A pane: its settings, the frames of its answer, and the frame that it shows

class Pane {
  constructor(given) {
    this.element = $("pane").content.firstElementChild.cloneNode(true);
    this.fields = {};
    for (const field of this.element.querySelectorAll("[name]")) this.fields[field.name] = field;
    this.fields.model.append(...setup.models.map((model) => option(model.name)));
    this.fields.strategy.append(...Object.keys(setup.strategies).map(option));
    this.set(given);
    this.fields.model.addEventListener("change", () => this.followModel());
    this.fields.strategy.addEventListener("change", () => this.followStrategy(true));
    this.element.addEventListener("change", () => { this.summarise(); remember(); });
    this.find("details").open = matchMedia("(min-width: 700px)").matches;
    this.find(".remove").addEventListener("click", () => remove(this));
    this.find(".answer").addEventListener("pointerover", (event) => this.tell(event.target));
    this.find(".answer").addEventListener("click", (event) => this.tell(event.target));
    this.clear();
  }

  find(selector) { return this.element.querySelector(selector); }

  set(given) {
    const known = setup.models.find((model) => model.name === given.model) || setup.models[0];
    this.fields.model.value = known.name;
    this.fields.block.value = given.block || known.block;
    this.fields.steps.value = given.steps || this.fields.block.value;
    this.fields.temperature.value = given.temperature ?? setup.defaults.temperature;
    this.fields.strategy.value = given.strategy in setup.strategies ? given.strategy : setup.defaults.remasking_strategy;
    this.followStrategy(given.threshold === undefined);
    if (given.threshold !== undefined) this.fields.threshold.value = given.threshold;
    this.summarise();
  }

  summarise() {
    const { model, block, steps } = this.fields;
    this.find("summary").textContent = `${model.value}, ${steps.value} step${steps.value === "1" ? "" : "s"} a block of ${block.value}`;
  }

  followModel() {
    const model = setup.models.find((item) => item.name === this.fields.model.value);
    const full = this.fields.steps.value === this.fields.block.value;
    this.fields.block.value = model.block;
    this.fields.steps.value = full ? model.block : Math.min(this.fields.steps.value, model.block);
  }

  followStrategy(fresh) {
    const threshold = setup.strategies[this.fields.strategy.value];
    this.find(".threshold").hidden = threshold === null;
    if (fresh && threshold !== null) this.fields.threshold.value = setup.defaults[threshold];
  }

  // The pane's part of a link.
  link() {
    const { model, block, steps, temperature, strategy, threshold } = this.fields;
    const values = [model, block, steps, temperature, strategy].map((field) => field.value);
    if (setup.strategies[strategy.value] !== null) values.push(threshold.value);
    return values.map(encodeURIComponent).join(",");
  }

  static fromLink(text) {
    const [model, block, steps, temperature, strategy, threshold] = text.split(",").map(decodeURIComponent);
    return { model, block, steps, temperature, strategy, threshold };
  }

  settings() {
    const threshold = setup.strategies[this.fields.strategy.value];
    return {
      block_size: number(this.fields.block),
      denoising_steps_per_block: number(this.fields.steps),
      remasking_strategy: this.fields.strategy.value,
      temperature: number(this.fields.temperature),
      max_token: number($("tokens")),
      ...(threshold === null ? {} : { [threshold]: number(this.fields.threshold) }),
    };
  }

  clear() {
    this.frames = [];
    this.end = null;
    this.done = false;
    this.size = Number(this.fields.block.value);
    this.differing = new Set();
    this.rewind();
    for (const name of [".info", ".said", ".error"]) this.find(name).textContent = "";
    this.find(".said").classList.remove("other");
    this.find(".error").hidden = true;
    this.figures();
  }

  // Ask the server and keep the frames as they come.
  async ask(question, signal) {
    const body = { question, model: this.fields.model.value, data_type: $("kind").value, seed: number($("seed")) };
    try {
      const response = await fetch("/answer", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, settings: this.settings() }),
        signal,
      });
      for await (const line of lines(response.body)) this.take(JSON.parse(line));
      if (!this.end && this.find(".error").hidden) this.fail("the answer broke off; see the terminal of t3d play");
    } catch (error) {
      this.fail(signal.aborted ? "stopped" : `the server does not answer (${error.message})`);
    }
    this.done = true;
  }

  take(frame) {
    if (frame.error) this.fail(frame.error);
    else if (frame.end) this.end = frame.end;
    else if (frame.begin) {
      const n = frame.begin.unknown;
      if (n) this.find(".info").textContent = `The model does not know ${n} word${n > 1 ? "s" : ""} of the question.`;
    } else this.frames.push(frame);
  }

  fail(text) {
    this.find(".error").textContent = text;
    this.find(".error").hidden = false;
  }

  rewind() {
    this.shown = 0;
    this.tokens = [];
    this.find(".answer").replaceChildren();
    this.blocks = [];
  }

  // Show the state after n steps.
  show(n) {
    n = Math.min(n, this.frames.length);
    if (n < this.shown) this.rewind();
    const last = this.shown === n ? null : this.frames[n - 1];
    while (this.shown < n) this.apply(this.frames[this.shown++]);
    if (last) this.figures();
    const said = this.end && n === this.frames.length ? this.end : null;
    this.find(".said").textContent = said && said.answer !== null ? `Answer: ${said.answer}` : "";
    if (said && said.cut) this.find(".said").textContent += " (cut at the length limit)";
  }

  apply(frame) {
    const from = frame.from;
    if (!this.blocks.length || this.blocks.at(-1).from !== from) {
      const element = document.createElement("span");
      element.className = "block";
      this.find(".answer").append(element);
      this.blocks.push({ from, element, steps: [] });
    }
    const block = this.blocks.at(-1);
    if (frame.fresh.length) block.steps.push(frame.step);
    this.tokens.length = Math.min(this.tokens.length, from + frame.tokens.length);
    frame.tokens.forEach((text, offset) => {
      const at = frame.fresh.indexOf(from + offset), old = this.tokens[from + offset];
      const now = at >= 0 ? { step: frame.step, p: frame.p[at] } : old && text !== null ? old : {};
      this.tokens[from + offset] = { step: now.step, p: now.p, text };
    });
    for (const old of this.element.querySelectorAll(".fresh")) old.classList.remove("fresh");
    block.element.replaceChildren(...frame.tokens.map((_, offset) => this.span(from + offset, block, frame.step)));
  }

  span(index, block, now) {
    const token = this.tokens[index], span = document.createElement("span");
    span.className = "tok";
    span.dataset.index = index;
    if (token.text === null) {
      span.classList.add("mask");
      span.textContent = MASK;
      return span;
    }
    span.textContent = token.text;
    span.classList.toggle("whole", !token.text.includes("\n")); // such a token is not broken at its leading space
    const rank = block.steps.indexOf(token.step) + 1;
    [span.style.background, span.style.color] = colour(rank, this.size);
    span.classList.toggle("fresh", token.step === now);
    span.classList.toggle("differs", this.differing.has(index));
    const sure = token.p === null || token.p === undefined ? "" : `, probability ${token.p.toFixed(3)}`;
    span.title = `step ${token.step}, ${rank}. in its block${sure}`;
    return span;
  }

  tell(target) {
    if (target.title) this.find(".info").textContent = `“${target.textContent}”: ${target.title}`;
  }

  figures() {
    const frame = this.frames[this.shown - 1] || { forwards: 0, seconds: 0, length: 0 };
    this.find(".forwards").textContent = frame.forwards;
    this.find(".seconds").textContent = frame.seconds.toFixed(2);
    this.find(".rate").textContent = frame.seconds ? Math.round(frame.length / frame.seconds) : 0;
    this.find(".count").textContent = frame.length;
  }

  // The texts of the whole answer's tokens.
  texts() {
    const found = [];
    for (const frame of this.frames) {
      found.length = frame.from;
      found.push(...frame.tokens);
    }
    return found;
  }

  // The number of frames to show now, when a forward is shown for at least `least` milliseconds.
  due(elapsed, least) {
    let n = this.shown;
    while (n < this.frames.length && this.frames[n].forwards * least <= elapsed) n++;
    return n;
  }
}

function number(field) {
  return field.value.trim() === "" ? null : Number(field.value);
}

async function* lines(stream) {
  const decoder = new TextDecoder();
  let rest = "";
  const reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const parts = rest.split("\n");
    rest = parts.pop();
    yield* parts.filter(Boolean);
    if (done) break;
  }
  if (rest) yield rest;
}

// The indices of `second` that a longest common subsequence with `first` lacks; none where the table would be too large.
function differences(first, second) {
  if (first.length * second.length > MOST) return new Set();
  const width = second.length + 1, table = new Uint32Array((first.length + 1) * width);
  for (let i = first.length - 1; i >= 0; i--)
    for (let j = second.length - 1; j >= 0; j--)
      table[i * width + j] = first[i] === second[j] ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  const found = new Set();
  let i = 0;
  for (let j = 0; j < second.length; ) {
    if (i < first.length && first[i] === second[j]) { i++; j++; }
    else if (i < first.length && table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    else found.add(j++);
  }
  return found;
}

// ---------------------------------------------------------------------------------------------------------------------
// Asking and replaying

let controller = null;

async function ask(event) {
  event.preventDefault();
  stop();
  const mine = ++round, question = $("question").value;
  remember();
  $("note").textContent = "";
  $("replay").hidden = true;
  for (const pane of panes) pane.clear();
  controller = new AbortController();
  const { signal } = controller, asked = [...panes];
  $("stop").disabled = false;
  began = performance.now();
  requestAnimationFrame(() => draw(mine));
  if ($("serial").checked) {
    for (const pane of asked) {
      if (mine === round) began = performance.now();
      await pane.ask(question, signal);
      while (mine === round && pane.shown < pane.frames.length && !signal.aborted) await new Promise(requestAnimationFrame);
    }
  } else await Promise.all(asked.map((pane) => pane.ask(question, signal)));
}

function stop() {
  if (controller) controller.abort();
  controller = null;
}

function draw(mine) {
  if (mine !== round) return;
  const elapsed = performance.now() - began, least = Number($("slow").value);
  const stopped = controller === null;
  for (const pane of panes) pane.show(stopped ? pane.frames.length : pane.due(elapsed, least));
  if (panes.every((pane) => pane.done && pane.shown === pane.frames.length)) finish();
  else requestAnimationFrame(() => draw(mine));
}

function finish() {
  $("stop").disabled = true;
  compare();
  const most = Math.max(0, ...panes.map((pane) => pane.frames.length));
  $("step").max = $("step").value = $("at").textContent = $("of").textContent = most;
  $("replay").hidden = most === 0;
  for (const pane of panes) { pane.rewind(); pane.show(most); }
}

// Mark what differs from the first pane: tokens, and the extracted answer.
function compare() {
  const [first, ...others] = panes;
  if (!first) return;
  first.differing = new Set();
  for (const pane of others) {
    const both = first.frames.length && pane.frames.length;
    pane.differing = both ? differences(first.texts(), pane.texts()) : new Set();
    const other = first.end && pane.end && first.end.answer !== pane.end.answer;
    pane.find(".said").classList.toggle("other", Boolean(other));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The page: panes, examples, the link

function add(given) {
  const pane = new Pane(given);
  panes.push(pane);
  $("panes").append(pane.element);
  legend();
}

function remove(pane) {
  if (panes.length === 1) return;
  panes = panes.filter((other) => other !== pane);
  pane.element.remove();
  remember();
}

function legend() {
  const size = Math.max(...panes.map((pane) => Number(pane.fields.block.value) || 1));
  $("legend").replaceChildren("Step within the block: ", ...Array.from({ length: Math.min(size, 16) }, (_, i) => {
    const span = document.createElement("span");
    span.className = "tok";
    span.textContent = i + 1;
    [span.style.background, span.style.color] = colour(i + 1, size);
    return span;
  }));
}

function examples() {
  $("examples").replaceChildren(...setup.examples[$("kind").value].map((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => { $("question").value = text; remember(); });
    return button;
  }));
}

const REMEMBERED = ["question", "kind", "seed", "tokens", "slow"];

// Keep the settings in the address.
function remember() {
  legend();
  const found = new URLSearchParams();
  for (const id of REMEMBERED) found.set(id, $(id).value);
  for (const pane of panes) found.append("pane", pane.link());
  history.replaceState(null, "", `#${found}`);
}

function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  $("tokens").value = setup.defaults.max_token;
  $("slow").value = "60";
  $("question").value = setup.examples[$("kind").value][0] || "";
  for (const id of REMEMBERED) {
    const before = $(id).value;
    if (given.has(id)) $(id).value = given.get(id);
    if ($(id).value === "" && id !== "question") $(id).value = before;  // no such choice
  }
  panes = [];
  $("panes").replaceChildren();
  let linked = [];
  try {
    linked = given.getAll("pane").map(Pane.fromLink);
  } catch { $("note").textContent = "The link is damaged; these are the usual settings."; }
  (linked.length ? linked : setup.panes).forEach(add);
  examples();
}

async function copyLink() {
  remember();
  try {
    await navigator.clipboard.writeText(location.href);
    $("note").textContent = "The link is in the clipboard.";
  } catch { $("note").textContent = location.href; }
}

async function start() {
  setup = await (await fetch("/setup")).json();
  $("kind").append(...setup.tasks.map(option));
  restore();
  document.body.classList.toggle("differ", $("differ").checked);
  $("ask").addEventListener("submit", ask);
  $("ask").addEventListener("change", remember);
  $("kind").addEventListener("change", examples);
  $("stop").addEventListener("click", stop);
  $("add").addEventListener("click", () => { add(setup.panes.at(-1)); remember(); });
  $("link").addEventListener("click", copyLink);
  $("differ").addEventListener("change", () => document.body.classList.toggle("differ", $("differ").checked));
  $("step").addEventListener("input", () => {
    $("at").textContent = $("step").value;
    for (const pane of panes) pane.show(Number($("step").value));
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
  });
  window.addEventListener("hashchange", () => { stop(); ++round; restore(); });
  document.body.dataset.ready = "yes";
}

start();
