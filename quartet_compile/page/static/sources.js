// Both sides of a graph in one direction, and what links them.

class Sources {
  /** choose: called with the item that a line belongs to. hover: with the items under the pointer. */
  constructor(data, choose, hover) {
    this.data = data;
    this.panes = Object.fromEntries(["before", "after"].map((side) => [side, new Pane(byId(side), byId(`size-${side}`))]));
    this.states = data.items.map((item) => item.state);
    this.selected = undefined;
    this.hovered = [];
    this.graph = undefined;
    this.unpacked = new Map();
    this.ignored = new Set();
    for (const [side, pane] of Object.entries(this.panes)) {
      const itemsAt = (event) => pane.owners.get(Number(event.target.closest(".code")?.dataset.line)) ?? [];
      pane.element.addEventListener("scroll", () => this.scrolled(side), { passive: true });
      pane.element.addEventListener("mouseover", (event) => hover(itemsAt(event)));
      pane.element.addEventListener("mouseleave", () => hover([]));
      pane.element.addEventListener("click", (event) => {
        const items = itemsAt(event);
        if (items.length && !String(getSelection())) choose(items.includes(this.selected) ? this.selected : items[0]);
      });
    }
    byId("graph").addEventListener("change", (event) => this.show(Number(event.target.value), this.direction));
    for (const tab of this.tabs()) {
      tab.addEventListener("click", () => this.show(this.graph, tab.dataset.direction));
      tab.addEventListener("keydown", (event) => {
        if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
        const other = this.tabs().find((button) => button !== tab && !button.disabled);
        other?.click();
        other?.focus();
      });
    }
    new ResizeObserver(() => this.resized()).observe(byId("panes"));
  }

  tabs() {
    return [...document.querySelectorAll("[role=tab]")];
  }

  async lines(graph, name) {
    const key = `${graph}/${name}`;
    if (!this.unpacked.has(key)) {
      const packed = document.querySelector(`script[data-source="${key}"]`);
      this.unpacked.set(key, packed ? inflate(packed.textContent) : Promise.resolve([]));
    }
    return this.unpacked.get(key);
  }

  has(graph, direction) {
    return Boolean(document.querySelector(`script[data-source^="${graph}/${direction}"]`));
  }

  link(item, direction = this.direction) {
    return this.data.links[this.graph]?.[direction].find(([own]) => own === item);
  }

  async show(graph, direction) {
    if (!this.has(graph, direction)) direction = "forward";
    if (graph === this.graph && direction === this.direction) return;
    Object.assign(this, { graph, direction });
    byId("graph").value = graph;
    for (const element of document.querySelectorAll("[data-graph]")) element.hidden = Number(element.dataset.graph) !== graph;
    for (const tab of this.tabs()) {
      tab.setAttribute("aria-selected", tab.dataset.direction === direction);
      tab.tabIndex = tab.dataset.direction === direction ? 0 : -1;
      tab.disabled = !this.has(graph, tab.dataset.direction);
    }
    byId("panes").setAttribute("aria-labelledby", `tab-${direction}`);
    const [before, after] = await Promise.all([this.lines(graph, `${direction}_before`), this.lines(graph, direction)]);
    if (this.graph !== graph || this.direction !== direction) return;
    const links = this.data.links[graph][direction];
    this.panes.before.show(before, owners(links, 1), this.states);
    this.panes.after.show(after, owners(links, 2), this.states);
    this.anchors = anchors(links, before.length, after.length);
    this.mark();
    this.toSelected();
  }

  /** Show an item's graph, in this direction if it has lines there, and go to its lines. */
  async select(item) {
    this.selected = item;
    const { graph } = this.data.items[item];
    if (graph === null) return this.mark();
    const links = this.data.links[graph];
    const here = (direction) => links[direction].some(([own]) => own === item);
    const direction = [this.direction, "forward", "backward"].find((name) => name && here(name)) ?? "forward";
    const same = graph === this.graph && direction === this.direction;
    await this.show(graph, direction);
    if (same) {
      this.mark();
      this.toSelected();
    }
  }

  toSelected() {
    const link = this.link(this.selected);
    if (!link) return this.go(this.first("before"), this.first("after"));
    const [, before, after, pairs] = link;
    const [a, b] = pairs[0] ?? [before[0], after[0]];
    this.go(a ?? before[0], b ?? after[0]);
  }

  /** The line where the graph itself begins. */
  first(side) {
    return Math.max(1, this.panes[side].lines.findIndex((line) => line.startsWith("class ")) + 1);
  }

  go(before, after) {
    for (const [side, line] of [["before", before], ["after", after]]) {
      if (line === undefined) continue;
      this.ignored.add(side);
      this.panes[side].scrollTo(line);
    }
    this.draw();
    requestAnimationFrame(() => requestAnimationFrame(() => this.ignored.clear()));
  }

  /** To a line of one source, and on the other side to what stands there. */
  async jump(name, line) {
    const before = name.endsWith("_before");
    byId("sources").scrollIntoView({ block: "nearest" });
    await this.show(this.data.items[this.selected].graph, name.replace("_before", ""));
    const other = Math.round(along(this.anchors, before ? 0 : 1, line));
    this.go(before ? line : other, before ? other : line);
  }

  hover(items) {
    if (String(items) === String(this.hovered)) return;
    this.hovered = items;
    this.mark();
  }

  mark() {
    for (const [i, side] of [[1, "before"], [2, "after"]]) {
      this.panes[side].mark("hover", this.hovered.flatMap((item) => this.link(item)?.[i] ?? []));
      this.panes[side].mark("selected", this.link(this.selected)?.[i] ?? []);
    }
    this.draw();
  }

  scrolled(side) {
    const other = side === "before" ? "after" : "before";
    if (byId("together").checked && !this.ignored.has(side) && this.anchors) {
      const { element } = this.panes[side];
      const third = element.clientHeight / 3;
      const line = (element.scrollTop + third) / LINE_HEIGHT;
      const target = Math.round(along(this.anchors, side === "before" ? 0 : 1, line) * LINE_HEIGHT - third);
      if (Math.abs(this.panes[other].element.scrollTop - target) > 1) {
        this.ignored.add(other);
        this.panes[other].element.scrollTop = target;
        requestAnimationFrame(() => requestAnimationFrame(() => this.ignored.delete(other)));
      }
    }
    this.draw();
  }

  resized() {
    for (const pane of Object.values(this.panes)) pane.drawRuler();
    this.draw();
  }

  draw() {
    this.drawing ??= requestAnimationFrame(() => {
      this.drawing = undefined;
      this.drawRibbons();
    });
  }

  drawRibbons() {
    const element = byId("ribbons");
    const { before, after } = this.panes;
    const [width, height] = [element.clientWidth, element.clientHeight];
    const top = height - before.element.offsetHeight;
    const paths = [];
    for (const [item, , , pairs] of this.data.links[this.graph]?.[this.direction] ?? []) {
      for (const [a, b] of pairs) {
        const [y, z] = [top + before.position(a), top + after.position(b)];
        if (Math.max(y, z) < top || Math.min(y, z) > height || (y < top && z > height) || (z < top && y > height)) continue;
        const strong = item === this.selected || this.hovered.includes(item);
        const path = svg("path", { class: this.states[item] + (strong ? " strong" : ""), d: `M0 ${y} C${width / 2} ${y} ${width / 2} ${z} ${width} ${z}` });
        strong ? paths.push(path) : paths.unshift(path);
      }
    }
    element.replaceChildren(...paths);
  }
}

/** The lines of a source that was deflated and written in base64. */
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return (await new Response(stream).text()).replace(/\n$/, "").split("\n");
}

/** Line -> items, of the lines before (side 1) or after (side 2). */
function owners(links, side) {
  const found = new Map();
  for (const link of links) for (const line of link[side]) found.set(line, [...(found.get(line) ?? []), link[0]]);
  return found;
}

/** Pairs of lines that stand beside each other, rising on both sides. */
function anchors(links, before, after) {
  const pairs = links.flatMap(([, , , own]) => own).sort((p, q) => p[0] - q[0] || p[1] - q[1]);
  const rising = [[0, 0]];
  for (const [a, b] of pairs) {
    const [lastA, lastB] = rising[rising.length - 1];
    if (a > lastA && b > lastB) rising.push([a, b]);
  }
  return [...rising, [before, after]];
}

/** What stands beside a line of one side (0 before, 1 after): between two anchors in proportion. */
function along(pairs, side, line) {
  let i = pairs.findIndex((pair) => pair[side] >= line);
  if (i < 0) i = pairs.length - 1;
  const [from, to] = [pairs[Math.max(0, i - 1)], pairs[i]];
  const share = to[side] === from[side] ? 0 : Math.min(1, (line - from[side]) / (to[side] - from[side]));
  return from[1 - side] + share * (to[1 - side] - from[1 - side]);
}
