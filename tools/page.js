// Shows the results that tools/page.py has computed and stored in this page as JSON.
//
// The texts come from data and models, and may contain HTML. They are inserted as text only: append(),
// replaceChildren() and textContent never read a string as HTML.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector) => document.querySelector(selector);
const findAll = (selector) => document.querySelectorAll(selector);

// Returns a new element. `children` are elements or texts.
function make(tag, attributes = {}, ...children) {
  const space = ["svg", "line", "polyline", "text"].includes(tag) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Returns a paragraph with a small title above the text.
const titled = (title, text, style = "") =>
  make("p", {}, make("b", {}, title), make("span", { class: style }, text));

const tableRow = (...cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
const number = (value, digits) => value?.toFixed(digits) ?? "none"; // null: it was not finite
const percent = (fraction, digits = 0) =>
  fraction === null ? "none" : `${(100 * fraction).toFixed(digits)}%`;
const indexOfLargest = (values) => values.indexOf(Math.max(...values));
const sum = (values) => values.reduce((a, b) => a + b, 0);

// -- pictures cut into patches ---------------------------------------------------------------------------

// Returns the style that shows patch `i` of a picture. `sizes` are the heights of its rows of patches, and
// also the widths of its columns.
function patchStyle(url, i, sizes) {
  const [column, row] = [i % sizes.length, Math.floor(i / sizes.length)];
  const place = (k) => percent(sum(sizes.slice(0, k)) / (sum(sizes) - sizes[k] || 1), 3);
  const scale = (k) => percent(sum(sizes) / sizes[k], 3);
  return `background: url("${url}") ${place(column)} ${place(row)} / ${scale(column)} ${scale(row)}`;
}

const patchName = (i, side) => `row ${Math.floor(i / side) + 1}, column ${(i % side) + 1}`;

// Fills `grid` with one button per patch and returns the buttons. The Tab key reaches one of them, and the
// arrow keys move from there. `point(i)` is called when patch i is pointed at or focused, and `click(i)` when
// it is clicked or Enter is pressed.
function fillGrid(grid, url, sizes, point, click = point) {
  const side = sizes.length;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side };
  const cells = Array.from({ length: side ** 2 }, (_, i) => make("button", {
    type: "button", class: "cell", tabindex: i ? -1 : 0, style: patchStyle(url, i, sizes),
    "aria-label": `patch in ${patchName(i, side)}`,
  }));
  cells.forEach((cell, i) => {
    cell.onmouseenter = () => point(i);
    cell.onclick = () => click(i);
    cell.onfocus = () => {
      for (const other of cells) other.tabIndex = other === cell ? 0 : -1;
      point(i);
    };
    cell.onkeydown = (event) => {
      const next = cells[i + moves[event.key]];
      if (!next) return; // another key, or the end of the picture
      event.preventDefault(); // or the page would scroll
      next.focus();
    };
  });
  const tracks = sizes.map((size) => `${size}fr`).join(" ");
  grid.style.gridTemplate = `${tracks} / ${tracks}`;
  grid.replaceChildren(...cells);
  return cells;
}

// Marks the chosen patch, and writes a label on every patch if there is room for it.
function labelPatches(cells, chosen, labels) {
  cells.forEach((cell, i) => {
    cell.classList.toggle("chosen", i === chosen);
    if (cells.length <= 16) cell.replaceChildren(make("span", {}, labels[i]));
  });
}

// -- 1. training -----------------------------------------------------------------------------------------

// All evaluations of all stages, in order. `x` counts the steps of both stages.
let total = 0;
const moments = data.stages.flatMap((stage) => {
  stage.start = total;
  total += stage.steps;
  return stage.evaluations.map((line) => ({ ...line, stage, x: stage.start + line.step }));
});
let now = moments.length - 1;
const onMove = []; // functions that show moments[now]

// Returns a chart. `lines` are [style, points]. A point is [x, y], and y is null if it was not finite.
function chart(label, lines) {
  const [left, right, top, bottom] = [52, 412, 8, 172];
  const values = lines.flatMap(([, points]) => points.map(([, y]) => y));
  const largest = Math.ceil(2 * Math.max(0.5, ...values)) / 2;
  const toX = (x) => left + (x / (total || 1)) * (right - left);
  const toY = (y) => bottom - (y / largest) * (bottom - top);
  const line = (x1, x2, y1, y2, style) => make("line", { x1, x2, y1, y2, class: style });
  const ticks = [0, largest / 2, largest].flatMap((y) => [
    line(left, right, toY(y), toY(y), "axis"),
    make("text", { x: left - 5, y: toY(y) + 4, "text-anchor": "end" }, y)]);
  const stages = data.stages.flatMap((stage) => [
    line(toX(stage.start), toX(stage.start), top, bottom, "axis"),
    make("text", { x: toX(stage.start) + 3, y: bottom + 17 }, stage.name)]);
  const path = (points) => points.filter(([, y]) => y !== null).map(([x, y]) => `${toX(x)},${toY(y)}`);
  const curves = lines.map(([style, points]) =>
    make("polyline", { points: path(points).join(" "), class: style }));
  const cursor = line(0, 0, top, bottom, "cursor");
  onMove.push(() => ["x1", "x2"].forEach((name) => cursor.setAttribute(name, toX(moments[now].x))));
  const attributes = { viewBox: "0 0 420 195", role: "img", "aria-label": label };
  return make("figure", {}, make("figcaption", {}, label),
    make("svg", attributes, ...ticks, ...stages, ...curves, cursor));
}

// Connects a slider with moments[now]. There are two sliders, and they move together.
function connectSlider(slider) {
  const [input, output] = slider.children;
  input.max = moments.length - 1;
  input.oninput = () => {
    now = Number(input.value);
    onMove.forEach((show) => show());
  };
  onMove.push(() => {
    input.value = now;
    output.textContent = `${moments[now].stage.name}, step ${moments[now].step}`;
    input.setAttribute("aria-valuetext", output.textContent);
  });
}

function showTraining() {
  const curve = (name) => moments.map((moment) => [moment.x, moment[name]]);
  const training = data.stages.flatMap((stage) =>
    stage.training.map((line) => [stage.start + line.step, line.loss]));
  find("#training .charts").append(
    chart("loss, nats per token",
      [["training", training], ["different", curve("heldout_loss_different")],
        ["correct", curve("heldout_loss")]]),
    chart("correct image more likely, fraction", [["match", curve("heldout_correct_more_likely")]]));
  onMove.push(() => {
    const { stage, generated, ...line } = moments[now];
    const before = stage.training.filter(({ step }) => step <= line.step).pop();
    const losses = [before?.loss, line.heldout_loss, line.heldout_loss_different];
    const values = [...losses.map((x) => number(x, 3)), percent(line.heldout_correct_more_likely, 1)];
    findAll("#training td:last-child").forEach((cell, i) => cell.replaceChildren(values[i]));
    find("#sample").textContent =
      `First held-out record. Generated: ${generated} — Reference: ${stage.reference}`;
  });
}

// -- 2. nearest tokens of a patch -------------------------------------------------------------------------

function showWords() {
  const output = find("#nearest .output");
  let cells = [], shownPicture = null;
  let patch = Math.max(0, indexOfLargest(moments[now].nearest_tokens.map(([nearest]) => nearest[1])));
  onMove.push(function show() {
    const { stage, step, nearest_tokens: nearest } = moments[now];
    if (stage.picture !== shownPicture) {
      shownPicture = stage.picture;
      const sizes = Array(Math.sqrt(nearest.length)).fill(1);
      cells = fillGrid(find("#nearest .grid"), stage.picture, sizes, (i) => { patch = i; show(); });
    }
    if (!nearest.length)
      return output.replaceChildren("The first held-out record of this stage has no image.");
    labelPatches(cells, patch, nearest.map(([first, second]) => `${first[0]}\n${second[0]}`));
    output.replaceChildren(
      titled(`Patch (${stage.name}, step ${step})`, patchName(patch, Math.sqrt(nearest.length))),
      make("table", {}, tableRow("nearest token", "cosine"), ...nearest[patch].map(([word, cosine]) =>
        tableRow(make("span", { class: "answer" }, word), cosine.toFixed(2)))));
  });
}

// -- 3. break it -----------------------------------------------------------------------------------------

// Fills a list of questions and calls show(question) for the chosen one, also at once.
function chooseQuestion(select, show) {
  select.append(...data.questions.map(({ question }, i) => new Option(`${i + 1}. ${question}`, i)));
  select.onchange = () => show(data.questions[select.value]);
  select.onchange();
}

// Says what the answer should be. The page knows this in the toy world only.
function expectation(answer, expected, asked) {
  if (expected === null) return titled("Reference answer for the unchanged picture", asked.reference);
  if (!expected) return titled("Expected", "The question has no correct answer any more.");
  return titled(`Expected answer (${answer === expected ? "given" : "not given"})`, expected);
}

// Says for how many patches an answer changes, and how many of the answers are the expected ones.
function summary(verb, answers, unchanged) {
  const changed = answers.filter(([answer]) => answer !== unchanged).length;
  const known = answers.filter(([, expected]) => expected);
  const equal = known.filter(([answer, expected]) => answer === expected).length;
  return `Each of the ${answers.length} patches was ${verb} alone: ${changed} of these changes gave another answer` +
    (known.length ? `, and ${equal} of ${known.length} answers were the expected ones. ` : ". ");
}

function showBreak(asked) {
  const sizes = data.regions;
  const cells = fillGrid(find("#break .grid"), asked.picture, sizes, () => {}, click);
  const unchanged = (i) => patchStyle(asked.picture, i, sizes);
  // Shows the picture and its answer. `style(i)` is the style of patch i.
  function show(title, [answer, expected], style) {
    cells.forEach((cell, i) => cell.setAttribute("style", style(i)));
    const color = expected ? (answer === expected ? "good" : "bad") : "";
    find("#break .output").replaceChildren(
      titled("Question", asked.question), titled("What was changed", title),
      titled("Answer to the unchanged picture", asked.answer[0] || "(empty)"),
      titled("Answer", answer || "(empty)", `answer ${color}`), expectation(answer, expected, asked));
  }
  function click(i) {
    // An erased patch has no style of its own, so that page.css draws its stripes.
    const [answers, title, changed] = find("#break input:checked").value === "erased"
      ? [asked.erased, "erased", ""]
      : [asked.copied, "copied from the second picture", patchStyle(asked.second, i, sizes)];
    show(`${title}: the patch in ${patchName(i, sizes.length)}`, answers[i],
      (k) => k === i ? changed : unchanged(k));
  }
  const undo = () => show("nothing", asked.answer, unchanged);
  find("#break .undo").onclick = undo;
  find("#break .shuffle").onclick = () =>
    show("all patches are shuffled", asked.shuffled, (i) => patchStyle(asked.shuffled_picture, i, sizes));
  find("#break .second").src = asked.second;
  const largest = Math.max(...sizes);
  find("#break .summary").textContent =
    summary("erased", asked.erased, asked.answer[0]) + summary("copied", asked.copied, asked.answer[0]) +
    (largest > 1 ? "In parts 3 and 4, the patch that you choose is a region of up to " +
      `${largest} × ${largest} patches of the model.` : "");
  undo();
}

// -- 4. attention and effect -----------------------------------------------------------------------------

function showCause(asked) {
  const output = find("#cause .output");
  const grids = ["attention", "effect"].map((name) => fillGrid(
    find(`#cause .${name}`), asked.picture, data.regions, (i) => { patch = i; show(); }));
  const buttons = asked.tokens.map((text) => make("button", { type: "button" }, text.trim() || "␣"));
  buttons.forEach((button, i) => { button.onclick = () => { token = i; show(); }; });
  find("#cause .tokens").replaceChildren(...buttons);
  // At first, a token is chosen that attends to a patch and depends on one, and then the patch on which it
  // depends most.
  let token = indexOfLargest(asked.tokens.map((_, i) =>
    Math.max(...asked.attention[i]) * Math.max(...asked.effect[i])));
  let patch = token < 0 ? 0 : Math.max(0, indexOfLargest(asked.effect[token]));
  function show() {
    if (token < 0) return output.replaceChildren("The answer is empty.");
    const [attention, effect] = [asked.attention[token], asked.effect[token]];
    const [, p, other, pOther] = asked.probabilities[token];
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === token));
    // The patch with the largest value is the brightest. If all effects are below 0.5 nats, even this patch
    // is darkened, because the effects are small.
    for (const [cells, values, least] of [[grids[0], attention, 1e-6], [grids[1], effect, 0.5]]) {
      const largest = Math.max(least, ...values);
      cells.forEach((cell, i) => {
        const darkness = 0.7 * (1 - Math.max(0, values[i]) / largest);
        cell.style.boxShadow = `inset 0 0 0 99rem rgba(var(--shade), ${darkness.toFixed(3)})`;
      });
    }
    labelPatches(grids[0], patch, attention.map((value) => percent(value)));
    labelPatches(grids[1], patch, effect.map((value) => number(value, 1)));
    output.replaceChildren(
      titled("Token", asked.tokens[token].trim() || "(space)", "answer"),
      titled("Its probability", percent(p, 1)),
      titled("Most likely other token", `${other} (${percent(pOther, 1)})`),
      titled("Patch", patchName(patch, data.regions.length)),
      titled(`Attention (layer ${asked.layer}, mean over its heads)`, percent(attention[patch], 1)),
      titled("log p falls by (nats) if the patch is erased", number(effect[patch], 2)),
      titled("Correlation of the two over all tokens and patches of this answer",
        number(asked.correlation, 2)));
  }
  show();
}

// -- 5. labeled tokens -----------------------------------------------------------------------------------

function showLabels(stage) {
  const tokens = stage.tokens.map(([text, labeled]) => make("span",
    labeled ? { class: "labeled", title: "labeled" } : { title: "ignored" },
    text.replaceAll("\n", "↵") || "·"));
  const count = stage.tokens.filter(([, labeled]) => labeled).length;
  const title = make("h3", {}, `${stage.name}: ${count} labeled tokens`);
  find("#labels").append(title, make("div", { class: "record" }, ...tokens));
}

// -- 6. answers ------------------------------------------------------------------------------------------

// page.css hides the cards that the filter leaves out.
function showAnswers(group) {
  const cards = group.shown.map(({ picture, question, answer, reference }) => {
    const right = answer === reference;
    return make("div", { class: `card ${right ? "right" : "wrong"}` },
      ...(picture ? [make("img", { src: picture, alt: "" })] : []),
      make("p", {}, question),
      make("p", { class: right ? "good" : "bad" }, `${right ? "=" : "≠"} ${answer || "(empty)"}`),
      ...(right ? [] : [make("p", { class: "note" }, `reference: ${reference}`)]));
  });
  find("#answers").append(make("h3", {}, group.name), make("p", { class: "note" },
    `Equal to the reference answer: ${group.equal} of ${group.asked} generated answers. ` +
    `Shown: ${group.shown.length}, first those that differ.`),
    make("div", { class: "cards" }, ...cards));
}

document.title = `LLaVA: ${data.run}`;
find("#run").textContent = `${data.run}, stage ${data.stage}`;
find("#patches").textContent = data.patches;
findAll(".slider").forEach(connectSlider);
showTraining();
showWords();
onMove.forEach((show) => show());
chooseQuestion(find("#break select"), showBreak);
chooseQuestion(find("#cause select"), showCause);
data.stages.forEach(showLabels);
data.answers.forEach(showAnswers);
