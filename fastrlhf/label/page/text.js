// Text of models and people as nodes: never markup, and nothing in it that cannot be seen.

// Controls, bidi marks and overrides, invisible characters, tags, lone surrogates; joiners of scripts and emoji stay.
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180e" +
  "\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff0-\\ufffb\\u{e0000}-\\u{e007f}\\p{Cs}]", "gu");

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child != null));
  return made;
}

// Put a text into a node; a character that would not be seen is written as its number.
export function put(node, text) {
  let from = 0;
  const whole = text.replace(/\r\n/g, "\n");
  for (const match of whole.matchAll(HIDDEN)) {
    node.append(whole.slice(from, match.index));
    const code = "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    node.append(element("span", { class: "hidden-character" }, code));
    from = match.index + match[0].length;
  }
  node.append(whole.slice(from));
  return node;
}

export const FOLD_CHARACTERS = 700, FOLD_LINES = 10;

export function isLong(text) {
  return text.length > FOLD_CHARACTERS || text.split("\n").length > FOLD_LINES;
}

// The beginning of a long text; no character of two halves is cut in the middle.
export function beginning(text) {
  const lines = text.split("\n").slice(0, FOLD_LINES).join("\n").slice(0, FOLD_CHARACTERS);
  return /[\ud800-\udbff]$/.test(lines) ? lines.slice(0, -1) : lines;
}

const TOKENS = /[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[\p{L}\p{N}_]+|\s+|[^]/gu;
const MOST_CELLS = 4e6;

// [[0 kept | -1 removed | 1 added, text], ...] between two texts, by words, Chinese by characters.
export function difference(before, after) {
  const a = before.match(TOKENS) ?? [], b = after.match(TOKENS) ?? [];
  let start = 0, end = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const x = a.slice(start, a.length - end), y = b.slice(start, b.length - end), parts = [];
  const add = (kind, token) => {
    if (parts.at(-1)?.[0] === kind) parts.at(-1)[1] += token; else parts.push([kind, token]);
  };
  a.slice(0, start).forEach(token => add(0, token));
  if (x.length * y.length > MOST_CELLS) {
    x.forEach(token => add(-1, token));
    y.forEach(token => add(1, token));
  } else {
    align(x, y, add);
  }
  a.slice(a.length - end).forEach(token => add(0, token));
  return parts;
}

// Longest common subsequence; table[i][j]: its length in x[i:], y[j:].
function align(x, y, add) {
  const width = y.length + 1, table = new Uint32Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i--) {
    for (let j = y.length - 1; j >= 0; j--) {
      table[i * width + j] = x[i] === y[j] ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  let i = 0, j = 0;
  while (i < x.length || j < y.length) {
    if (i < x.length && j < y.length && x[i] === y[j]) { add(0, x[i++]); j++; }
    else if (j === y.length || i < x.length && table[(i + 1) * width + j] >= table[i * width + j + 1]) add(-1, x[i++]);
    else add(1, y[j++]);
  }
}
