// Shows the results that tools/page.py has computed and stored in this page as JSON.
//
// The texts come from data and models, and may contain HTML. They are set by textContent only, which shows
// them as they are.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector, parent = document) => parent.querySelector(selector);

// Returns a new element. `children` are elements or texts.
function make(tag, attributes = {}, ...children) {
  const space = ["svg", "line", "polyline", "text"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// -- pictures cut into patches ---------------------------------------------------------------------------

// Returns the style that shows patch `i` of a picture, whose rows have `side` patches.
function patchStyle(url, i, side) {
  const percent = (k) => (side > 1 ? (100 * k) / (side - 1) : 0);
  const position = `${percent(i % side)}% ${percent(Math.floor(i / side))}%`;
  return `background: url("${url}") ${position} / ${100 * side}% auto`;
}

const patchName = (i, side) => `row ${Math.floor(i / side) + 1}, column ${(i % side) + 1}`;

// Fills `grid` with one button per patch and returns the buttons. One of them is in the order of the Tab key,
// and the arrow keys move to its neighbors. `point(i)` is called when patch i is pointed at or focused, and
// `click(i)` when it is clicked or Enter is pressed.
function fillGrid(grid, url, count, point, click = point) {
  const side = Math.sqrt(count);
  const cells = Array.from({ length: count }, (_, i) => make("button", {
    type: "button", class: "cell", tabindex: i ? -1 : 0, style: patchStyle(url, i, side),
    "aria-label": `patch in ${patchName(i, side)}`,
  }));
  cells.forEach((cell, i) => {
    cell.addEventListener("mouseenter", () => point(i));
    cell.addEventListener("focus", () => point(i));
    cell.addEventListener("click", () => click(i));
    cell.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side }[event.key];
      const next = cells[i + move];
      if (!next || (Math.abs(move) === 1 && Math.floor(i / side) !== Math.floor((i + move) / side))) return;
      event.preventDefault();
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  });
  grid.style.gridTemplateColumns = `repeat(${side}, 1fr)`;
  grid.replaceChildren(...cells);
  return cells;
}

// Returns a paragraph with a small title above the text.
const titled = (title, text, style = "") =>
  make("p", {}, make("b", {}, title), make("span", { class: style }, text));

// Returns a table row.
const row = (...cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));

// -- 1. training -----------------------------------------------------------------------------------------

// All evaluations of all stages, in order. `x` counts the steps of both stages.
const moments = [];
let total = 0;
for (const stage of data.stages) {
  stage.start = total;
  for (const line of stage.evaluations) moments.push({ stage, ...line, x: stage.start + line.step });
  total += stage.steps;
}
let now = moments.length - 1;
const onMove = []; // functions that show moments[now]

// Returns a chart. `lines` are [style, points], and a point is [x, y]; y can be missing.
function chart(label, lines) {
  const [width, height, left, bottom] = [420, 210, 34, 24];
  const all = lines.flatMap(([, points]) => points.map(([, y]) => y)).filter((y) => y !== null);
  const top = Math.ceil(2 * Math.max(0.5, ...all)) / 2;
  const toX = (x) => left + (x / (total || 1)) * (width - left - 8);
  const toY = (y) => height - bottom - (y / top) * (height - bottom - 22);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  svg.append(make("text", { x: 0, y: 13 }, label));
  for (const y of [0, top / 2, top]) {
    svg.append(make("line", { x1: left, x2: width - 8, y1: toY(y), y2: toY(y), class: "axis" }),
      make("text", { x: left - 5, y: toY(y) + 4, "text-anchor": "end" }, y ? Number(y.toFixed(2)) : "0"));
  }
  for (const stage of data.stages) {
    const x = toX(stage.start);
    svg.append(make("line", { x1: x, x2: x, y1: 22, y2: height - bottom, class: "axis" }),
      make("text", { x: x + 3, y: height - 7 }, `${stage.name}: ${stage.steps} steps`));
  }
  for (const [style, points] of lines) {
    const shown = points.filter(([, y]) => y !== null).map(([x, y]) => `${toX(x)},${toY(y)}`);
    svg.append(make("polyline", { points: shown.join(" "), class: style }));
  }
  const cursor = make("line", { y1: 22, y2: height - bottom, class: "cursor" });
  svg.append(cursor);
  onMove.push(() => {
    cursor.setAttribute("x1", toX(moments[now].x));
    cursor.setAttribute("x2", toX(moments[now].x));
  });
  return svg;
}

function key(style, text) {
  const sample = make("svg", { viewBox: "0 0 32 10", "aria-hidden": "true" });
  sample.append(make("polyline", { points: "0,5 32,5", class: style }));
  return make("span", { class: "key" }, sample, ` ${text}`);
}

function showTraining() {
  for (const slider of document.querySelectorAll(".slider")) {
    const input = make("input", { type: "range", min: 0, max: moments.length - 1, value: now,
      "aria-label": "evaluation" });
    const output = make("output");
    input.addEventListener("input", () => {
      now = Number(input.value);
      onMove.forEach((show) => show());
    });
    slider.replaceChildren(input, output);
    onMove.push(() => {
      input.value = now;
      output.textContent = `${moments[now].stage.name}, step ${moments[now].step}`;
      input.setAttribute("aria-valuetext", output.textContent);
    });
  }
  const lineOf = (name) => moments.map((moment) => [moment.x, moment[name]]);
  const training = data.stages.flatMap((stage) =>
    stage.training.map((line) => [stage.start + line.step, line.loss]));
  find("#training .charts").append(
    chart("loss, nats per token", [["training", training], ["different", lineOf("different")],
      ["correct", lineOf("loss")]]),
    chart("correct image more likely: fraction of held-out records", [["match", lineOf("match")]]));
  const number = (value, digits = 3) => (value === null ? "not finite" : value.toFixed(digits));
  onMove.push(() => {
    const moment = moments[now];
    const before = moment.stage.training.filter((line) => line.step <= moment.step).pop();
    const rows = [["training", "training loss", before ? number(before.loss) : "no step yet"],
      ["correct", "held-out loss, correct image", number(moment.loss)],
      ["different", "held-out loss, different image", number(moment.different)],
      ["match", "correct image more likely (chance 50%)", `${number(100 * moment.match, 0)}%`]];
    find("#training tbody").replaceChildren(
      ...rows.map(([style, name, value]) => row(key(style, name), value)));
    find("#sample").textContent =
      `First held-out record. Generated: ${moment.generated} — Reference: ${moment.stage.reference}`;
  });
}

// -- 2. what a patch says --------------------------------------------------------------------------------

function showWords() {
  const section = find("#words");
  let shownStage = null, cells = [];
  // At first, the patch with the largest cosine is chosen.
  const last = moments[now].words || [];
  let patch = last.reduce((best, words, i) => (words[0][1] > last[best][0][1] ? i : best), 0);
  function show() {
    const { stage, step, words } = moments[now];
    const output = find(".output", section);
    if (!words || !words.length || !stage.picture) {
      shownStage = null;
      find(".grid", section).replaceChildren();
      output.textContent = "The log of this evaluation has no nearest tokens.";
      return;
    }
    if (stage !== shownStage) {
      shownStage = stage;
      cells = fillGrid(find(".grid", section), stage.picture, words.length, (i) => { patch = i; show(); });
    }
    patch = Math.min(patch, words.length - 1);
    cells.forEach((cell, i) => {
      cell.classList.toggle("chosen", i === patch);
      if (words.length > 16) return; // no room for words
      cell.replaceChildren(make("span", {}, `${words[i][0][0]}\n${words[i][1][0]}`));
    });
    const rows = words[patch].map(([word, cosine]) =>
      row(make("span", { class: "answer" }, word), cosine.toFixed(2)));
    output.replaceChildren(
      titled(`Patch (${stage.name}, step ${step})`, patchName(patch, Math.sqrt(words.length))),
      make("table", {}, make("tbody", {}, row("nearest token", "cosine"), ...rows)));
  }
  onMove.push(show);
}

// -- 3. break it -----------------------------------------------------------------------------------------

// Fills a list of questions and calls show(question) for the chosen one, also at once.
function chooseQuestion(select, show) {
  select.append(...data.questions.map((asked, i) =>
    make("option", { value: i }, `${i + 1}. ${asked.question}`)));
  select.addEventListener("change", () => show(data.questions[select.value]));
  if (data.questions.length) show(data.questions[0]);
}

// Says what the answer should be. The page knows this in the toy world only.
function expectation(answer, expected, asked) {
  if (expected === null) return titled("Reference answer for the unchanged picture", asked.reference);
  if (!expected) return titled("Expected", "The question has no correct answer any more.");
  return titled(`Expected, ${answer === expected ? "equal to" : "different from"} the answer`, expected);
}

function showBreak() {
  const section = find("#break");
  const side = Math.sqrt(data.regions);
  const change = () => find("input:checked", section).value;
  let asked, cells;
  function show(title, [answer, expected]) {
    const style = expected ? (answer === expected ? "good" : "bad") : "";
    find(".output", section).replaceChildren(
      titled("Question", asked.question), titled("What was changed", title),
      titled("Answer", answer || "(empty)", `answer ${style}`), expectation(answer, expected, asked));
  }
  const draw = (i, url, from) => {
    cells[i].classList.remove("erased");
    cells[i].setAttribute("style", patchStyle(url, from, side));
  };
  function undo() {
    cells.forEach((_, i) => draw(i, asked.picture, i));
    show("nothing", asked.answer);
  }
  function click(i) {
    undo();
    if (change() === "erased") cells[i].classList.add("erased");
    else draw(i, asked.second, i);
    show(`${change() === "erased" ? "erased" : "copied from the second picture"}: the patch in ${
      patchName(i, side)}`, asked[change()][i]);
  }
  function shuffle() {
    cells.forEach((_, i) => draw(i, asked.picture, asked.order[i]));
    show("all patches are shuffled", asked.shuffled);
  }
  find(".undo", section).addEventListener("click", undo);
  find(".shuffle", section).addEventListener("click", shuffle);
  chooseQuestion(find("select", section), (question) => {
    asked = question;
    find(".second", section).src = asked.second;
    cells = fillGrid(find(".grid", section), asked.picture, data.regions, () => {}, click);
    undo();
    const sentences = [["erased", "Erasing"], ["copied", "Copying"]].map(([name, verb]) => {
      const changed = asked[name].filter(([answer]) => answer !== asked.answer[0]).length;
      const known = asked[name].filter(([, expected]) => expected);
      const equal = known.filter(([answer, expected]) => answer === expected).length;
      return `${verb} one patch changes the answer for ${changed} of ${asked[name].length} patches. ` +
        (known.length ? `${equal} of ${known.length} answers are the expected ones. ` : "");
    });
    const block = data.patches / data.regions;
    find(".summary", section).textContent = sentences.join("") +
      (block > 1 ? `In parts 3 and 4, a patch is a square of ${block} patches of the model.` : "");
  });
}

// -- 4. attention is not cause ---------------------------------------------------------------------------

function showCause() {
  const section = find("#cause");
  const side = Math.sqrt(data.regions);
  chooseQuestion(find("select", section), (asked) => {
    // At first, the token and the patch with the largest effect are chosen.
    let token = 0, patch = 0;
    (asked.effect || []).forEach((row, t) => row.forEach((value, i) => {
      if (value > asked.effect[token][patch]) [token, patch] = [t, i];
    }));
    const grids = ["attention", "effect"].map((name) => [name, fillGrid(
      find(`.${name}`, section), asked.picture, data.regions, (i) => { patch = i; show(); })]);
    const buttons = asked.tokens.map((text, i) => make("button", { type: "button" }, text.trim() || "␣"));
    buttons.forEach((button, i) => button.addEventListener("click", () => { token = i; show(); }));
    find(".tokens", section).replaceChildren(...buttons);
    function show() {
      if (!asked.attention) {
        find(".output", section).replaceChildren("The answer is empty.");
        return;
      }
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === token));
      for (const [name, cells] of grids) {
        const values = asked[name][token];
        // The patch with the largest value is the brightest. If all effects are below 0.5 nats, no patch is
        // bright, because these effects are small.
        const largest = Math.max(name === "effect" ? 0.5 : 1e-6, ...values);
        cells.forEach((cell, i) => {
          const darkness = 0.85 * (1 - Math.max(0, values[i]) / largest);
          cell.style.boxShadow = `inset 0 0 0 99rem rgba(var(--shade), ${darkness.toFixed(3)})`;
          cell.classList.toggle("chosen", i === patch);
          if (data.regions <= 16) {
            cell.replaceChildren(make("span", {}, name === "effect" ? values[i].toFixed(1)
              : `${(100 * values[i]).toFixed(0)}%`));
          }
        });
      }
      find(".output", section).replaceChildren(
        titled("Token", asked.tokens[token].trim() || "(space)", "answer"),
        titled("Patch", patchName(patch, side)),
        titled(`Attention (layer ${asked.layer}, mean over its heads)`,
          `${(100 * asked.attention[token][patch]).toFixed(1)}%`),
        titled("log p falls by (nats) if the patch is erased", asked.effect[token][patch].toFixed(2)),
        titled("Correlation of the two over all tokens and patches of this answer",
          asked.correlation.toFixed(2)));
    }
    show();
  });
}

// -- 5. what was trained ---------------------------------------------------------------------------------

function showLabels() {
  for (const stage of data.stages) {
    const tokens = stage.tokens.map(([text, labeled]) => make("span", {
      class: labeled ? "labeled" : "", title: labeled ? "labeled" : "ignored",
    }, text.replaceAll("\n", "↵") || "·"));
    const count = stage.tokens.filter(([, labeled]) => labeled).length;
    find("#labels").append(make("h3", {}, `${stage.name}: ${count} labeled tokens`),
      make("div", { class: "record" }, ...tokens));
  }
}

// -- 6. answers ------------------------------------------------------------------------------------------

function showAnswers() {
  const section = find("#answers");
  for (const group of data.answers) {
    const cards = make("div", { class: "cards" });
    const count = `${group.equal} of ${group.asked} generated answers equal the reference answer.`;
    section.append(make("h3", {}, group.name), make("p", { class: "note" },
      `${count} ${group.shown.length} are shown, first those that differ.`), cards);
    for (const shown of group.shown) {
      const right = shown.answer === shown.reference;
      const card = make("div", { class: `card ${right ? "right" : "wrong"}` });
      if (shown.picture) card.append(make("img", { src: shown.picture, alt: "", loading: "lazy" }));
      card.append(make("p", {}, shown.question),
        make("p", { class: right ? "good" : "bad" }, `${right ? "=" : "≠"} ${shown.answer || "(empty)"}`));
      if (!right) card.append(make("p", { class: "note" }, `reference: ${shown.reference}`));
      cards.append(card);
    }
  }
  for (const input of section.querySelectorAll("input")) {
    input.addEventListener("change", () => {
      for (const card of section.querySelectorAll(".card")) {
        card.classList.toggle("hidden", input.value !== "all" && !card.classList.contains(input.value));
      }
    });
  }
}

document.title = `LLaVA: ${data.run}`;
find("#run").textContent = `${data.run}, stage ${data.stage}`;
find("#patches").textContent = data.patches;
showTraining();
showWords();
onMove.forEach((show) => show());
showBreak();
showCause();
showLabels();
showAnswers();
