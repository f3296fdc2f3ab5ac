"use strict";
// The data of the page: a header in JSON, and one deflated blob per prompt, which is decoded when it is first shown.

const HEADER = JSON.parse(document.getElementById("header").textContent);
const METHODS = Object.keys(HEADER.methods);
const RESPONSE = 1, BRANCH = 2, TRAINS = 4, CLIPPED = 8, BOUNDED = 16, BARRIER = 32;

// Whether a method has a ratio and a clip; without them it is no policy-gradient method.
const hasRatio = (method) => HEADER.with_ratio.includes(method);
// Whether a method has pairs, with log-ratios, scores and a margin.
const hasMargin = (method) => HEADER.with_margin.includes(method);

async function inflate(id) {
  const coded = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(coded), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Signed integers from byte planes, low bytes first; `delta` columns hold steps modulo their width.
function integers(bytes, at, size, width, delta) {
  const out = new Int32Array(size), shift = 32 - 8 * width;
  for (let plane = 0; plane < width; plane++) {
    const begin = at + plane * size;
    for (let i = 0; i < size; i++) out[i] |= bytes[begin + i] << (8 * plane);
  }
  let sum = 0;
  for (let i = 0; i < size; i++) {
    sum = (((delta ? sum : 0) + out[i]) << shift) >> shift;
    out[i] = sum;
  }
  return out;
}

class Column {
  constructor(entry, body, size) {
    Object.assign(this, entry);
    this.unit = 10 ** -entry.decimals;
    if (entry.bytes) {
      this.numbers = integers(body, entry.at, size, entry.bytes, entry.delta);
      this.none = -(2 ** (8 * entry.bytes - 1));
    }
  }

  // The stored integer of a token, or null where there is no number.
  raw(row, token) {
    if (this.all !== undefined) return this.all;
    if (this.row) return this.row[row];
    const x = this.numbers[token];
    return x === this.none ? null : x;
  }

  number(row, token) {
    const x = this.raw(row, token);
    return x === null ? null : x / 10 ** this.decimals;
  }

  text(row, token) {
    const x = this.number(row, token);
    return x === null ? null : shown(x, this.decimals);
  }
}

function shown(x, decimals) {
  const text = Math.abs(x).toFixed(decimals);
  return x < 0 && Number(text) !== 0 ? "−" + text : text;
}

class Group {
  constructor(bytes, words, index) {
    const length = new DataView(bytes.buffer).getUint32(0, true);
    const told = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
    const body = bytes.subarray(4 + length);
    const { prompt, rows, nodes, methods } = told;
    Object.assign(this, { index, prompt, rows, nodes, methods, dictionary: words });
    this.size = this.rows.reduce((n, row) => n + row.length, 0);
    this.columns = told.columns.map((entry) => new Column(entry, body, this.size));
    this.logProb = this.columns[told.log_prob];
    for (const method of METHODS) {
      const own = this.methods[method];
      for (const name of ["advantage", "ratio", "low", "high", "weight", "flags"]) own[name] = this.columns[own[name]];
      if (hasMargin(method)) own.log_ratio = this.columns[own.log_ratio];
    }
    const { at, bytes: width } = told.words;
    const count = this.nodes.length.reduce((a, b) => a + b, 0);
    const copy = body.slice(at, at + count * width).buffer;
    this.words = width === 2 ? new Uint16Array(copy) : new Uint32Array(copy);
    this.starts = [];
    this.nodes.length.reduce((sum, n, v) => ((this.starts[v] = sum), sum + n), 0);
    let begin = 0;
    for (const row of this.rows) {
      row.begin = begin;
      begin += row.length;
      row.path = [];
      for (let v = row.leaf; v >= 0; v = this.nodes.parent[v]) row.path.unshift(v);
    }
    this.rows.forEach((row, number) => (row.number = number));
    this.children = this.nodes.parent.map(() => []);
    this.nodes.parent.forEach((parent, v) => parent >= 0 && this.children[parent].push(v));
  }

  nodeAt(row, position) {
    return row.path.findLast((v) => this.nodes.depth[v] <= position && this.nodes.length[v] > 0);
  }

  word(row, position) {
    const v = this.nodeAt(row, position);
    return this.dictionary[this.words[this.starts[v] + position - this.nodes.depth[v]]];
  }

  // Texts of a row's tokens.
  texts(row) {
    return row.path.flatMap((v) => this.nodeTexts(v));
  }

  nodeTexts(v, limit = Infinity) {
    const begin = this.starts[v], end = begin + Math.min(limit, this.nodes.length[v]);
    return Array.from(this.words.subarray(begin, end), (word) => this.dictionary[word]);
  }

  flags(method, row, position) {
    return this.methods[method].flags.raw(row.number, row.begin + position);
  }
}

const opened = new Map();
let dictionary = null;

async function open(index) {
  dictionary ??= inflate("vocabulary").then((bytes) => JSON.parse(new TextDecoder().decode(bytes)));
  if (!opened.has(index)) {
    if (opened.size > 8) opened.delete(opened.keys().next().value);
    const both = Promise.all([inflate(`group-${index}`), dictionary]);
    opened.set(index, both.then(([bytes, words]) => new Group(bytes, words, index)));
  }
  return opened.get(index);
}
