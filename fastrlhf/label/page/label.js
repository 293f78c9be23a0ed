// The page of `fastrlhf label`: one prompt at a time, three ways to judge its replies, everything by mouse or keys.
import { WORDS } from "./words.js";
import { beginning, difference, element, isLong, put } from "./text.js";

const $ = id => document.getElementById(id);
const query = new URLSearchParams(location.search);
const MODES = ["score", "rank", "edit"], RETRY_MS = 1500, SCORES = [1, 2, 3, 4, 5];
const letter = i => String.fromCharCode(65 + i % 26) + (i >= 26 ? Math.floor(i / 26) : "");

let screen = null;      // what the server said last
let mode = "score", language = "en", busy = false, view = "judge";
let scores, places, unsafe, edit, focus, unfolded;  // of the prompt on the screen; places: 1 is best, equal is a tie
let shownSince = 0, seconds = 0;

const words = () => WORDS[language];
const fill = (text, ...values) => values.reduce((filled, value) => filled.replace("{}", value), text);
const count = () => screen.item.replies.length;

// ------------------------------------------------------------------------------------------------------ the server

// A question that gets no answer is asked again: the server keeps a judgement once, however often it is sent.
async function ask(name, body = {}) {
  for (;;) {
    try {
      const answer = await fetch("api/" + name, {
        method: "POST", body: JSON.stringify(body),
        headers: {
          "content-type": "application/json", authorization: "Bearer " + query.get("token"),
          "x-annotator": encodeURIComponent(query.get("annotator")),
        },
      });
      const data = await answer.json();
      $("error").hidden = answer.ok;
      if (!answer.ok) $("error").replaceChildren(put(element("span"), fill(words().refused, data.error)));
      return answer.ok ? data : null;
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error;
      $("error").textContent = words().offline;
      $("error").hidden = false;
      await new Promise(done => setTimeout(done, RETRY_MS));
    }
  }
}

async function go(name, body) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  const answer = await ask(name, body);
  busy = false;
  document.body.classList.remove("busy");
  if (answer !== null) begin(answer);
}

function begin(answer) {
  const first = screen === null;
  screen = answer;
  if (first) language = sessionStorage.getItem("language") ?? screen.language;
  const item = screen.item;
  if (item !== null) {
    const none = value => Array(item.replies.length).fill(value), before = item.before ?? {};
    [scores, places, unsafe] = [before.scores ?? none(null), none(null), before.unsafe ?? none(false)];
    const ranking = (before.ranking ?? []).map(group => group.filter(place => !unsafe[place]));
    ranking.forEach((group, i) => group.forEach(place => { places[place] = i + 1; }));
    edit = before.edit ?? null;
    if (MODES.includes(before.kind)) mode = before.kind;
    if (item.replies.length < 2 && mode === "rank") mode = "score";
    [focus, unfolded, seconds, shownSince] = [edit?.reply ?? 0, new Set(), 0, performance.now()];
  }
  draw();
  scrollTo(0, 0);
}

document.addEventListener("visibilitychange", () => {  // a page in the background is not being judged
  if (document.hidden) seconds += (performance.now() - shownSince) / 1000;
  shownSince = performance.now();
});
const spent = () => seconds + (document.hidden ? 0 : (performance.now() - shownSince) / 1000);

// ---------------------------------------------------------------------------------------------------------- judging

// What is missing before the judgement can be saved; null: nothing.
function lacking() {
  if (mode === "score") return scores.some((s, i) => s !== null || unsafe[i]) ? null : words().needScore;
  if (mode === "rank") return places.every((p, i) => p !== null || unsafe[i]) ? null : words().needRank;
  const changed = edit !== null && edit.text.trim() && edit.text !== plain(screen.item.replies[edit.reply]);
  return changed ? null : words().needEdit;
}

const plain = text => text.replace(/\r\n?/g, "\n");  // as a text field holds it

function save() {
  if (lacking() !== null) return say(lacking());
  const body = { item: screen.item.id, kind: mode, unsafe, seconds: Math.min(spent(), 86400) };
  if (mode === "score") body.scores = scores;
  if (mode === "rank") body.ranking = tiers().map(([, group]) => group);
  if (mode === "edit") body.edit = edit;
  go("judge", body);
}

const skip = () => go("judge", { item: screen.item.id, kind: "skip", seconds: Math.min(spent(), 86400) });
const undo = () => { if (screen.last !== null) go("undo", { item: screen.last }); };

function say(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = false;
}

// [[place, [reply, ...]], ...] of the safe replies that have a place, best first.
function tiers() {
  const groups = new Map();
  places.forEach((place, i) => {
    if (place !== null && !unsafe[i]) groups.set(place, [...(groups.get(place) ?? []), i]);
  });
  return [...groups].sort((a, b) => a[0] - b[0]);
}

function value(i, number) {  // the score or place of a reply; 0 takes it away
  if (unsafe[i] || mode === "edit") return;
  const most = mode === "score" ? SCORES.length : count();
  if (number > most) return;
  (mode === "score" ? scores : places)[i] = number || null;
  if (number) focus = nextWithout(i, i);
  draw();
}

function nextWithout(i, otherwise) {
  const values = mode === "score" ? scores : places;
  const order = [...values.keys()].map(k => (i + 1 + k) % values.length);
  return order.find(k => values[k] === null && !unsafe[k]) ?? otherwise;
}

function drop(i, target) {  // a letter dropped: "tie:3" beside those at place 3, "gap:1" behind the first group, "none"
  const [kind, number] = target.split(":");
  if (kind === "none") places[i] = null;
  if (kind === "tie") places[i] = Number(number);
  if (kind === "gap") {
    const others = tiers().map(([, group]) => group.filter(k => k !== i));
    others.splice(Number(number), 0, [i]);
    others.filter(group => group.length).forEach((group, place) => group.forEach(k => { places[k] = place + 1; }));
  }
  focus = i;
  draw();
}

function toggleUnsafe(i) {
  unsafe[i] = !unsafe[i];
  focus = i;
  draw();
}

function startEdit(i) {
  if (edit === null || edit.reply !== i) edit = { reply: i, text: plain(screen.item.replies[i]) };
  mode = "edit";
  focus = i;
  draw();
  document.querySelector("textarea").focus();
  document.querySelector("textarea").scrollIntoView({ block: "nearest" });
}

function setMode(wanted) {
  if (screen.item === null || wanted === "rank" && count() < 2) return;
  [mode, view] = [wanted, "judge"];
  if (mode !== "edit") focus = nextWithout(-1, focus);
  draw();
}

// ---------------------------------------------------------------------------------------------------------- drawing

const button = (text, act, attributes = {}, key = null) => element(
  "button", { type: "button", onclick: () => act(), ...attributes }, text, key && element("kbd", {}, key));

const card = i => document.querySelector(`[data-reply="${i}"]`);

function draw() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  const judging = view === "judge" && screen.item !== null, t = words();
  $("modes").replaceChildren(...MODES.map(name => button(t[name], () => setMode(name), {
    role: "tab", "aria-selected": String(judging && name === mode), "data-mode": name,
    disabled: screen.item === null || name === "rank" && count() < 2,
  }, name[0].toUpperCase())));
  const all = screen.judged + screen.skipped + screen.left;
  $("done").style.width = `${all ? 100 * (all - screen.left) / all : 100}%`;
  $("progress").textContent = fill(t.progress, screen.judged, screen.left) +
    (screen.skipped ? (language === "zh" ? "，" : ", ") + fill(t.skipped, screen.skipped) : "");
  $("tools").replaceChildren(
    button(t.undo, undo, { id: "undo", disabled: screen.last === null }, "Z"),
    button(view === "summary" ? t.back : t.summary, toggleSummary, { id: "summary" }),
    button(t.keys, showHelp, { id: "keys" }, "?"),
    button(t.other, turnLanguage, { id: "language", lang: language === "zh" ? "en" : "zh-CN" }));
  $("error").hidden = true;
  if (view === "summary") return;
  $("main").replaceChildren(...(screen.item === null ? [finished()] : [conversation(), ...replies()]));
  $("foot").classList.toggle("empty", !judging);
  $("strip").hidden = !judging || mode !== "rank";
  if (judging) drawFoot();
  else $("actions").replaceChildren();
  card(focus)?.focus({ preventScroll: true });  // not the button that was pressed: the next key judges
}

function drawFoot() {
  const t = words(), name = "save" + mode[0].toUpperCase() + mode.slice(1);
  $("actions").replaceChildren(
    button(t.skip, skip, { id: "skip" }, "N"),
    button(t[name], save, { id: "save", class: "main", "aria-disabled": String(lacking() !== null) },
      mode === "edit" ? "Ctrl+Enter" : "Enter"));
  if (mode === "rank") $("strip").replaceChildren(...strip());
}

function finished() {
  const t = words();
  return element("section", { class: "finished" }, element("h1", {}, t.finished), element("p", {}, t.finishedText),
    button(t.summary, toggleSummary, { class: "main" }));
}

function conversation() {
  const t = words();
  const turns = screen.item.turns.map((turn, i) => element("li", { class: "turn " + turn.role },
    element("span", { class: "who" }, t[turn.role] ?? turn.role), ...folded(turn.content, "turn" + i)));
  return element("section", { class: "conversation", "aria-label": t.conversation }, element("ol", {}, ...turns));
}

function folded(text, name) {
  const t = words(), long = isLong(text), open = unfolded.has(name);
  const body = put(element("div", { class: "text", dir: "auto" }), long && !open ? beginning(text) : text);
  if (!long) return [body];
  if (!open) body.classList.add("cut");
  const turn = () => { open ? unfolded.delete(name) : unfolded.add(name); draw(); };
  const label = open ? t.less : fill(t.more, [...text].length.toLocaleString("en"));
  return [body, button(label, turn, { class: "fold" }, name === "reply" + focus ? "O" : null)];
}

function replies() {
  const t = words();
  return [element("h1", { id: "task" }, t.task[mode]),
    element("section", { class: "replies", "aria-label": t.replies }, ...screen.item.replies.map(reply))];
}

function reply(text, i) {
  const t = words(), name = fill(t.reply, letter(i));
  const look = () => { focus = i; mark(); };
  const isEdited = mode === "edit" && edit?.reply === i;
  return element("article", {
    class: "reply" + (i === focus ? " focus" : "") + (unsafe[i] ? " unsafe" : ""), tabindex: "-1",
    "data-reply": i, "aria-label": name, onpointerdown: look, onfocusin: look,
  },
  element("header", {}, element("b", { class: "letter" }, letter(i)),
    unsafe[i] ? element("span", { class: "note" }, t.isUnsafe) : element("span", { class: "note" }),
    button(t.unsafe, () => toggleUnsafe(i), { class: "mark", "aria-pressed": String(unsafe[i]) }, "X")),
  ...(isEdited ? editor(text, i) : folded(text, "reply" + i)),
  controls(i, isEdited));
}

function controls(i, isEdited) {
  if (mode !== "edit") return unsafe[i] ? null : choices(i);
  const begin = button(words().editThis, () => startEdit(i), { class: "wide" }, "Enter");
  return isEdited ? null : element("div", { class: "controls" }, begin);
}

function choices(i) {
  const t = words(), scoring = mode === "score", chosen = (scoring ? scores : places)[i];
  const numbers = scoring ? SCORES : Array.from({ length: count() }, (_, k) => k + 1);
  const end = text => element("span", { class: "end" }, text);
  return element("div", { class: "controls", role: "radiogroup", "aria-label": scoring ? t.score : t.place },
  end(scoring ? t.low : t.best),
  ...numbers.map(number => button(String(number), () => value(i, chosen === number ? 0 : number), {
    role: "radio", "aria-checked": String(chosen === number), class: "choice", "data-value": number,
  })), end(scoring ? t.high : t.worst));
}

function editor(text, i) {
  const t = words(), shown = element("div", { class: "text diff", dir: "auto", "aria-label": t.changes });
  const redraw = () => {
    const parts = difference(plain(text), edit.text);
    const same = parts.every(([kind]) => kind === 0);
    shown.replaceChildren(...(same ? [element("span", { class: "soft" }, t.noChange)]
      : parts.map(([kind, part]) => put(element(["del", "span", "ins"][kind + 1]), part))));
    $("save")?.setAttribute("aria-disabled", String(lacking() !== null));
  };
  const grow = field => { field.style.height = "auto"; field.style.height = `${field.scrollHeight + 2}px`; };
  const field = element("textarea", {
    "aria-label": t.editing, dir: "auto", spellcheck: "true", rows: "3",
    oninput: event => { edit.text = event.target.value; grow(event.target); redraw(); },
  });
  field.value = edit.text;
  redraw();
  requestAnimationFrame(() => grow(field));
  const back = () => { edit = null; focus = i; draw(); };
  return [element("label", { class: "small" }, t.editing), field, element("span", { class: "small" }, t.changes), shown,
    element("div", { class: "controls" }, button(t.original, back, { class: "wide" }))];
}

function strip() {
  const t = words(), groups = tiers();
  const chip = i => element("button", {
    type: "button", class: "chip", "data-chip": i, "aria-label": fill(t.reply, letter(i)),
    onpointerdown: event => drag(event, i),
  }, letter(i));
  const gap = i => element("i", { class: "gap", "data-drop": "gap:" + i }, i && i < groups.length ? "›" : "");
  const row = element("div", { class: "tiers" }, element("span", { class: "end" }, t.best), gap(0));
  groups.forEach(([place, group], i) => {
    row.append(element("span", { class: "tier", "data-drop": "tie:" + place }, ...group.map(chip)), gap(i + 1));
  });
  row.append(element("span", { class: "end" }, t.worst));
  const waiting = [...places.keys()].filter(i => places[i] === null && !unsafe[i]);
  const tray = element("div", { class: "tray", "data-drop": "none" },
    ...(waiting.length ? [element("span", { class: "end" }, t.unranked), ...waiting.map(chip)]
      : [element("span", { class: "soft" }, t.rankHint)]));
  const bad = [...unsafe.keys()].filter(i => unsafe[i]);
  const last = bad.length ? element("div", { class: "tray" }, element("span", { class: "end" }, t.alwaysLast),
    ...bad.map(i => element("span", { class: "chip bad" }, letter(i)))) : null;
  return [row, tray, last].filter(part => part !== null);
}

function drag(event, i) {
  event.preventDefault();
  const chip = event.currentTarget, from = [event.clientX, event.clientY];
  chip.setPointerCapture(event.pointerId);
  const isAlone = place => place.classList.contains("tier") && place.children.length === 1 && place.contains(chip);
  const target = at => document.elementsFromPoint(at.clientX, at.clientY).filter(e => e !== chip)
    .map(e => e.closest("[data-drop]")).find(e => e !== null && !isAlone(e)) ?? null;
  const move = at => {
    document.body.classList.add("dragging");
    chip.style.transform = `translate(${at.clientX - from[0]}px, ${at.clientY - from[1]}px)`;
    document.querySelector(".over")?.classList.remove("over");
    target(at)?.classList.add("over");
  };
  const end = at => {
    chip.removeEventListener("pointermove", move);
    document.body.classList.remove("dragging");
    const dropped = at.type === "pointerup" ? target(at) : null;
    if (dropped !== null) return drop(i, dropped.dataset.drop);
    focus = i;
    draw();
    card(i)?.scrollIntoView({ block: "nearest" });
  };
  chip.addEventListener("pointermove", move);
  chip.addEventListener("pointerup", end, { once: true });
  chip.addEventListener("pointercancel", end, { once: true });
}

function mark() {  // the frame alone: nothing is drawn anew under a selection
  document.querySelectorAll(".reply").forEach((one, i) => one.classList.toggle("focus", i === focus));
}

function turnLanguage() {
  language = language === "zh" ? "en" : "zh";
  sessionStorage.setItem("language", language);
  if (view === "summary") { view = "judge"; draw(); toggleSummary(); } else draw();
}

function showHelp() {
  const t = words();
  $("help").replaceChildren(element("h2", {}, t.keys), element("dl", {}, ...t.help.flatMap(([keys, what]) => [
    element("dt", {}, ...keys.split("  ").map(key => element("kbd", {}, key))), element("dd", {}, what)])),
    button(t.close, () => $("help").close(), { class: "main" }));
  $("help").showModal();
}

// ---------------------------------------------------------------------------------------------------------- summary

async function toggleSummary() {
  if (view === "summary") { view = "judge"; draw(); return; }
  const figures = await ask("summary");
  if (figures === null) return;
  view = "summary";
  draw();
  const t = words().sum, none = words().sum.none;
  const tile = (name, shown, note = "") => element("div", { class: "tile" }, element("div", { class: "name" }, name),
    put(element("div", { class: "value" + (shown === null ? " soft" : "") }), shown === null ? "–" : String(shown)),
    element("div", { class: "soft" }, shown === null ? none : note));
  const cell = (text, i) => put(element("td", { class: i ? "number" : null, dir: "auto" }), String(text ?? "–"));
  const table = (title, header, rows) => element("section", { class: "table" }, element("h2", {}, title),
    element("table", {}, element("thead", {}, element("tr", {}, ...header.map(
      (name, i) => element("th", { class: i ? "number" : null }, name)))),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map(cell))))));
  const { preferred, pairs } = figures.longer;
  $("main").replaceChildren(element("section", { class: "summary" }, element("h1", {}, words().summary),
    element("div", { class: "tiles" }, tile(t.judgements, figures.judgements), tile(t.prompts, figures.prompts),
      tile(t.skipped, figures.skipped), tile(t.unsafe, figures.unsafe), tile(t.seconds, figures.seconds),
      tile(t.alphaScores, figures.alpha_scores, t.alphaNote),
      tile(t.alphaPreferences, figures.alpha_preferences, t.alphaNote),
      tile(t.longer, pairs ? `${Math.round(100 * preferred / pairs)}%` : null, fill(t.of, preferred, pairs))),
    table(t.people, [t.name, t.judgements, t.seconds],
      figures.annotators.map(one => [one.name, one.judgements, one.seconds])),
    table(t.bias, [t.placeNo, t.bestTimes, t.chance],
      figures.places.map(one => [letter(one.place - 1), one.best, one.by_chance])),
    figures.disagreements.length ? table(t.against, [t.prompt, t.opposite], figures.disagreements.map(
      one => [one.prompt, fill(t.of, one.opposite, one.pairs)])) : element("p", { class: "soft" }, t.agree)));
  $("strip").hidden = true;
  $("actions").replaceChildren();
  $("foot").classList.add("empty");
}

// ------------------------------------------------------------------------------------------------------------- keys

const KEYS = {
  s: () => setMode("score"), r: () => setMode("rank"), e: () => setMode("edit"),
  j: () => step(1), arrowdown: () => step(1), k: () => step(-1), arrowup: () => step(-1),
  x: () => toggleUnsafe(focus), n: skip, z: undo,
  o: () => { const name = "reply" + focus; unfolded.has(name) ? unfolded.delete(name) : unfolded.add(name); draw(); },
  enter: () => mode === "edit" && edit?.reply !== focus ? startEdit(focus) : save(),
};

function step(by) {
  focus = Math.max(0, Math.min(count() - 1, focus + by));
  mark();
  card(focus).focus({ preventScroll: true });
  card(focus).scrollIntoView({ block: "nearest", behavior: "instant" });
}

document.addEventListener("keydown", event => {
  const key = event.key.toLowerCase(), writing = event.target.tagName === "TEXTAREA";
  if (busy || screen === null || $("help").open || event.isComposing || event.altKey) return;
  const command = event.ctrlKey || event.metaKey;
  if (writing && key === "enter" && command) { event.preventDefault(); return save(); }
  if (writing && key === "escape") { event.preventDefault(); return card(focus).focus({ preventScroll: true }); }
  if (writing || command || key === "enter" && event.target.tagName === "BUTTON") return;
  if (event.repeat && !key.startsWith("arrow")) return;  // a key that is held skips one prompt, not ten
  if (key === "?") { event.preventDefault(); return showHelp(); }
  if (key === "z") { event.preventDefault(); return undo(); }
  if (view !== "judge" || screen.item === null) return;
  if (/^[0-9]$/.test(key)) {
    event.preventDefault();
    value(focus, Number(key));
    return card(focus).scrollIntoView({ block: "nearest" });
  }
  if (KEYS[key]) { event.preventDefault(); KEYS[key](); }
});

go("next");
