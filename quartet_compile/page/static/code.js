"use strict";

// A source in a pane: blocks of lines that are plain text, and near the visible part lines with colours and marks.

const BLOCK = 64;
const LINE_HEIGHT = 17;
const TOKEN = /(#.*)|(;\s+[\w =]+= None$)|("[^"]*"|'[^']*')|(torch\.ops\.quartet(?:\.\w+)+)|\b(import|from|class|def|return|for|in|if|with|pass|None|True|False|self|isinstance)\b|(\b\d[\w.]*(?:e-?\d+)?)/g;
const TOKEN_CLASSES = ["c", "gone", "s", "q", "k", "n"];

/** The nodes of one line of Python, coloured lightly. */
function coloured(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(TOKEN)) {
    if (match.index > end) parts.push(text.slice(end, match.index));
    const span = document.createElement("span");
    span.className = TOKEN_CLASSES[match.slice(1).findIndex((group) => group !== undefined)];
    span.textContent = match[0];
    parts.push(span);
    end = match.index + match[0].length;
  }
  if (end < text.length) parts.push(text.slice(end));
  return parts;
}

class Pane {
  /** Indented by two columns a level, as panes are narrow. owners: a map from line to the items it belongs to. states: of the items. */
  constructor(element, label) {
    this.element = element;
    this.label = label;
    this.lines = [];
    this.owners = new Map();
    this.marked = { hover: new Set(), selected: new Set() };
    this.observer = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) isIntersecting ? this.fill(target) : this.empty(target);
    }, { root: element, rootMargin: "600px" });
  }

  show(lines, owners, states) {
    this.observer.disconnect();
    lines = lines.map((line) => line.replace(/^ +/, (spaces) => spaces.slice(spaces.length / 2)));
    Object.assign(this, { lines, owners, states });
    const widest = lines.reduce((most, line) => Math.max(most, line.length), 0);
    const blocks = document.createDocumentFragment();
    for (let first = 0; first < lines.length; first += BLOCK) {
      const block = document.createElement("div");
      block.className = "block";
      block.dataset.first = first;
      block.style.cssText = `height: ${Math.min(BLOCK, lines.length - first) * LINE_HEIGHT}px; width: calc(${widest}ch + 72px)`;
      this.empty(block);
      blocks.append(block);
    }
    this.element.replaceChildren(blocks);
    for (const block of this.element.children) this.observer.observe(block);
    this.label.textContent = lines.length ? `· ${lines.length.toLocaleString("en")} lines` : "· none";
    this.drawRuler();
  }

  /** Plain text costs next to nothing, and the browser's search finds it. */
  empty(block) {
    const first = Number(block.dataset.first);
    block.classList.add("plain-text");
    block.textContent = this.lines.slice(first, first + BLOCK).join("\n");
  }

  fill(block) {
    if (!block.classList.contains("plain-text")) return;
    const first = Number(block.dataset.first);
    const lines = this.lines.slice(first, first + BLOCK);
    const rows = lines.map((text, i) => {
      const number = first + i + 1;
      const row = document.createElement("div");
      const items = this.owners.get(number);
      row.className = "code" + (items ? ` own ${this.states[items[0]]}` : "");
      row.dataset.line = number;
      row.append(...coloured(text));
      for (const mark of ["hover", "selected"]) row.classList.toggle(mark, this.marked[mark].has(number));
      return row;
    });
    const numbers = document.createElement("div");
    numbers.className = "numbers";
    numbers.textContent = lines.map((_, i) => first + i + 1).join("\n");
    block.classList.remove("plain-text");
    block.replaceChildren(...rows, numbers);
  }

  row(number) {
    const block = this.element.children[Math.floor((number - 1) / BLOCK)];
    return block && !block.classList.contains("plain-text") ? block.children[(number - 1) % BLOCK] : undefined;
  }

  /** name: "hover" or "selected". */
  mark(name, numbers) {
    for (const number of this.marked[name]) this.row(number)?.classList.remove(name);
    this.marked[name] = new Set(numbers);
    for (const number of numbers) this.row(number)?.classList.add(name);
  }

  /** Where a line's middle is, in pixels below the visible top. */
  position(number) {
    return (number - 0.5) * LINE_HEIGHT - this.element.scrollTop;
  }

  scrollTo(number) {
    this.element.scrollTo(0, (number - 1) * LINE_HEIGHT - this.element.clientHeight / 3);
  }

  /** Where the lines of items are in the whole source, beside the scroll bar. */
  drawRuler() {
    const side = this.element.parentElement;
    side.querySelector(".ruler")?.remove();
    const height = this.element.clientHeight;
    const paths = {};
    for (const [number, items] of this.owners) {
      const y = Math.round((number / this.lines.length) * height);
      (paths[this.states[items[0]]] ??= new Set()).add(`M0 ${y}h7`);
    }
    const ruler = svg("svg", { class: "ruler", height, style: `bottom: ${this.element.offsetHeight - height}px` });
    for (const [state, marks] of Object.entries(paths)) ruler.append(svg("path", { class: state, d: [...marks].join("") }));
    side.append(ruler);
  }
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
