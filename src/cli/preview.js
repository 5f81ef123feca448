// Builds the rows of a preview. Rows far from the window have no elements, as a page may hold
// millions of tokens. Text of the dataset becomes text nodes and nothing else.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const tip = $("tip");
const number = new Intl.NumberFormat("en");
const SMALL = 60000; // tokens that a page can show at once

function element(name, className, text) {
  const e = document.createElement(name);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

// ---- Rows ----

const cards = data.rows.map((row) => ({ row, card: null, body: null, built: false, text: null, hits: [] }));

function percent(part, whole) {
  const share = part / Math.max(whole, 1);
  if (share > 0 && share < 0.0005) return "<0.1 %";
  if (share < 1 && share >= 0.9995) return ">99.9 %";
  return (share * 100).toFixed(1) + " %";
}

function head(entry) {
  const { row } = entry;
  const card = element("article");
  card.id = "row-" + row.number + (row.side ? "-" + row.side : "");
  const title = element("h2");
  const link = element("a", "", "row " + number.format(row.number));
  link.href = "#" + card.id;
  title.append(link, element("span", "from", row.source));
  if (row.side) title.append(element("span", "side", row.side));
  const trained = row.runs.reduce((sum, run) => sum + run[0] * run[2], 0);
  const total = row.tokens.length;
  const sum = `${number.format(total)} tokens, ${number.format(trained)} trained (${percent(trained, total)})`;
  title.append(element("span", "sum", sum));
  card.append(title, strip(row));
  for (const note of row.notes) card.append(element("p", "note", note));
  entry.card = card;
  entry.body = element("div", "body");
  entry.body.tabIndex = 0;
  entry.body.setAttribute("role", "group");
  entry.body.setAttribute("aria-label", "tokens of row " + row.number + ", arrow keys move");
  entry.body.style.minHeight = estimate(row) + "px";
  entry.body.entry = entry;
  card.append(entry.body);
  return card;
}

// Where in the row tokens train, as one line of colour.
function strip(row) {
  const line = element("div", "strip");
  line.setAttribute("aria-hidden", "true");
  const stops = [];
  let at = 0;
  for (const [count, , trained] of row.runs) {
    const color = trained ? "#3aa35c" : "transparent";
    const percent = (n) => ((100 * n) / row.tokens.length).toFixed(3) + "%";
    const last = stops[stops.length - 1];
    if (last && last.color === color) last.to = percent(at + count);
    else stops.push({ color, from: percent(at), to: percent(at + count) });
    at += count;
  }
  if (stops.length && stops.length <= 400) {
    const list = stops.map((s) => `${s.color} ${s.from} ${s.to}`);
    line.style.backgroundImage = `linear-gradient(to right, ${list.join(", ")})`;
  }
  return line;
}

// A height to reserve before a row is built: about 20 tokens a line.
function estimate(row) {
  return Math.ceil(row.tokens.length / 20) * 22 + row.turns.length * 20;
}

// Role, whether it trains, segment and position of every token.
function facts(row) {
  const list = [];
  for (const [count, role, trained, segment, position] of row.runs)
    for (let i = 0; i < count; i++) list.push({ role, trained, segment, position: position + i });
  return list;
}

// What a token shows: its text, line breaks and tabs marked. The marks are not copied.
function fill(target, text) {
  for (const piece of text.split(/([\n\t])/)) {
    if (piece === "\n" || piece === "\t") target.append(element("i", piece === "\n" ? "n" : "t"));
    if (piece) target.append(piece);
  }
}

function span(row, index, fact) {
  const token = row.tokens[index];
  const text = data.texts[token];
  let name = "x";
  if (fact.trained) name += " y";
  if (data.special[token]) name += " s";
  if (!text) name += " z";
  const e = element("span", name);
  fill(e, text);
  e.index = index;
  return e;
}

// Builds the elements of a row: one a token; to print, one a run.
function build(entry, byRun) {
  const { row, body } = entry;
  const all = facts(row);
  const parts = document.createDocumentFragment();
  const packed = row.runs.some((run) => run[3] !== row.runs[0][3]);
  let at = 0;
  let segment = -1;
  for (const [role, count] of row.turns) {
    const first = all[at];
    if (packed && first.segment !== segment) {
      segment = first.segment;
      parts.append(element("div", "segment", `segment ${segment}, positions from ${first.position}`));
    }
    const name = data.roles[role];
    const turn = element("div", "turn");
    const text = element("div", "text");
    const end = at + count;
    if (name === "padding" && count > 1) {
      text.append(span(row, at, first), element("span", "times", " × " + number.format(count)));
      at = end;
    }
    if (byRun) at = runs(row, all, at, end, text);
    for (; at < end; at++) text.append(span(row, at, all[at]));
    if (text.querySelector(".y")) turn.classList.add("has");
    turn.append(element("span", "role " + name, name), text);
    parts.append(turn);
  }
  body.replaceChildren(parts);
  body.style.minHeight = "";
  entry.built = true;
  if (!byRun) mark(entry);
}

// Appends tokens, those in one element that look alike.
function runs(row, all, at, end, text) {
  let last = null;
  let look = "";
  for (; at < end; at++) {
    const special = data.special[row.tokens[at]];
    if (last && !special && look === "" + all[at].trained) {
      fill(last, data.texts[row.tokens[at]]);
    } else {
      last = span(row, at, all[at]);
      look = special ? "special" : "" + all[at].trained;
      text.append(last);
    }
  }
  return at;
}

// Takes the elements of rows away, and keeps their heights. All are measured before any changes,
// as a change makes the browser lay out the page anew for the next measure.
function unbuild(entries) {
  const going = entries.filter((e) => e.built && !e.body.contains(document.activeElement));
  const heights = going.map((entry) => entry.body.offsetHeight);
  going.forEach((entry, i) => {
    entry.body.style.minHeight = heights[i] + "px";
    entry.body.replaceChildren();
    entry.built = false;
  });
}

// ---- Finding ----

// The text of a row, and where in it each token begins.
function searchable(entry) {
  if (!entry.text) entry.text = entry.row.tokens.map((t) => data.texts[t]).join("").toLowerCase();
  return entry.text;
}

function find() {
  const wanted = $("find").value.toLowerCase();
  let shown = 0;
  for (const entry of cards) {
    const inText = wanted !== "" && searchable(entry).includes(wanted);
    const isShown = !wanted || inText || entry.row.source.toLowerCase().includes(wanted);
    entry.card.hidden = !isShown;
    entry.wanted = inText ? wanted : "";
    shown += isShown;
    if (entry.built) mark(entry);
  }
  $("found").textContent = wanted ? `${number.format(shown)} of ${number.format(cards.length)} rows` : "";
  $("none").hidden = shown > 0 || cards.length === 0;
  hide();
}

// Marks the tokens that hold what was looked for.
function mark(entry) {
  for (const e of entry.hits) e.classList.remove("hit");
  entry.hits = [];
  if (!entry.wanted) return;
  const text = searchable(entry);
  let from = text.indexOf(entry.wanted);
  let at = 0;
  for (const e of entry.body.querySelectorAll(".x")) {
    const end = at + data.texts[entry.row.tokens[e.index]].length;
    while (from >= 0 && from + entry.wanted.length <= at) from = text.indexOf(entry.wanted, from + entry.wanted.length);
    if (from < 0) return;
    if (from < end) {
      e.classList.add("hit");
      entry.hits.push(e);
    }
    at = end;
  }
}

// ---- One token ----

let current = null;

function hide() {
  tip.hidden = true;
  if (current) current.classList.remove("at");
  current = null;
}

function show(e) {
  hide();
  const { row } = e.closest(".body").entry;
  const token = row.tokens[e.index];
  const fact = facts(row)[e.index];
  const text = data.texts[token] || "(part of the character before)";
  const role = data.roles[fact.role] + (data.special[token] ? ", special" : "");
  tip.replaceChildren(
    element("b", "", text.replaceAll("\n", "⏎").replaceAll("\t", "⇥")),
    `id ${data.ids[token]} · position ${fact.position} · segment ${fact.segment}`,
    element("br"),
    element("span", "", `${role}, ${fact.trained ? "trains" : "does not train"}, token ${e.index} of the row`),
  );
  current = e;
  e.classList.add("at");
  tip.hidden = false;
  place();
}

// Puts the tip below its token, or above it at the window's end.
function place() {
  const e = current;
  const box = e.getClientRects()[0] || e.getBoundingClientRect();
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)) + "px";
}

// Moves along the tokens of a row.
function move(body, key) {
  const inside = current && body.contains(current);
  const all = [...body.querySelectorAll(".x")].filter((e) => e.getClientRects().length);
  const last = all.length - 1;
  const at = inside ? all.indexOf(current) : -1;
  const to = { ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last }[key];
  if (to === undefined || !all[to]) return false;
  all[to].scrollIntoView({ block: "nearest" });
  show(all[to]);
  return true;
}

// ---- Events ----

const tokenAt = (event) => event.target instanceof Element && event.target.closest(".text .x");
const rows = $("rows");
rows.addEventListener("pointerover", (event) => {
  if (event.pointerType === "touch") return;
  const e = tokenAt(event);
  if (e) show(e);
  else hide();
});
rows.addEventListener("pointerleave", hide);
document.addEventListener("click", (event) => (tokenAt(event) ? show(tokenAt(event)) : hide()));
addEventListener("scroll", () => current && place(), { passive: true });
document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === "Escape") hide();
  else if (key === "/" && target !== $("find")) {
    event.preventDefault();
    $("find").focus();
  } else if (target.entry && move(target, key)) event.preventDefault();
});
for (const id of ["edges", "only"]) {
  const box = $(id);
  const apply = () => root.classList.toggle(id, box.checked);
  box.addEventListener("change", apply);
  apply();
}
let timer;
$("find").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(find, 120);
});
addEventListener("beforeprint", () => {
  hide();
  for (const entry of cards) if (!entry.card.hidden && !entry.built) build(entry, true);
});
addEventListener("afterprint", () => {
  if (isLarge) unbuild(cards);
  watch();
});

// ---- Start ----

const isLarge = data.rows.reduce((sum, row) => sum + row.tokens.length, 0) > SMALL;
let observer;
function watch() {
  if (!isLarge) return;
  if (observer) observer.disconnect();
  observer = new IntersectionObserver(
    (changes) => {
      for (const { target, isIntersecting } of changes) {
        const { entry } = target;
        if (isIntersecting && !entry.built) build(entry, false);
      }
      unbuild(changes.filter((c) => !c.isIntersecting).map((c) => c.target.entry));
    },
    { rootMargin: "1500px" },
  );
  for (const entry of cards) observer.observe(entry.body);
}
rows.append(...cards.map(head));
if (isLarge) watch();
else cards.forEach((entry) => build(entry, false));
if (location.hash.startsWith("#row-")) {
  const card = $(location.hash.slice(1));
  if (card) card.scrollIntoView();
}
