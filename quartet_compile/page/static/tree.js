// The module tree: folding, keys, search and filters.

class Tree {
  /** choose: called with the key of a leaf. */
  constructor(element, data, choose) {
    this.element = element;
    this.choose = choose;
    this.rows = [...element.querySelectorAll("[role=treeitem]")];
    this.leaves = this.rows.filter((row) => row.dataset.item !== undefined);
    this.modules = this.rows.filter((row) => row.dataset.item === undefined);
    this.items = data.items;
    this.ofItem = new Map();
    for (const leaf of this.leaves) this.ofItem.set(+leaf.dataset.item, [...(this.ofItem.get(+leaf.dataset.item) ?? []), leaf]);
    this.ofKey = new Map(this.leaves.map((leaf) => [leaf.dataset.key, leaf]));
    element.addEventListener("click", (event) => this.click(event));
    element.addEventListener("keydown", (event) => this.key(event));
    const many = this.leaves.length > 80;
    for (const module of many ? element.querySelectorAll(".blocks, .blocks > ul > .module") : []) this.unfold(module, false);
    if (this.rows.length) this.rows[0].tabIndex = 0;
  }

  unfold(module, open) {
    module.setAttribute("aria-expanded", open);
  }

  /** Only leaves whose item is in `states` and contains all `words`; while there are words, modules that contain such leaves unfold. */
  filter(words, states) {
    const matches = this.items.map((item) => states.has(item.state) && words.every((word) => item.words.includes(word)));
    this.folded ??= words.length ? new Map(this.modules.map((module) => [module, module.getAttribute("aria-expanded")])) : undefined;
    let shown = 0;
    for (const leaf of this.leaves) {
      leaf.hidden = !matches[leaf.dataset.item];
      shown += !leaf.hidden;
    }
    for (const module of this.modules) {
      module.hidden = !module.querySelector(".leaf:not([hidden])");
      if (words.length) this.unfold(module, true);
      else if (this.folded) module.setAttribute("aria-expanded", this.folded.get(module));
    }
    if (!words.length) this.folded = undefined;
    return shown;
  }

  visible() {
    return this.rows.filter((row) => !row.hidden && row.getClientRects().length > 0);
  }

  select(leaf) {
    this.element.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    leaf.setAttribute("aria-selected", "true");
    for (let row = leaf.parentElement.closest("[role=treeitem]"); row; row = row.parentElement.closest("[role=treeitem]")) this.unfold(row, true);
    this.makeReachable(leaf);
    const box = this.element.getBoundingClientRect();
    const own = leaf.getBoundingClientRect();
    if (own.top < box.top || own.bottom > Math.min(box.bottom, innerHeight)) this.element.scrollTop += own.top - box.top - box.height / 3;
  }

  makeReachable(row) {
    const before = this.element.querySelector("[tabindex='0']");
    if (before) before.tabIndex = -1;
    row.tabIndex = 0;
  }

  focus(row) {
    if (!row) return;
    this.makeReachable(row);
    row.focus();
  }

  hover(items) {
    for (const row of this.element.querySelectorAll(".hover")) row.classList.remove("hover");
    for (const item of items) for (const leaf of this.ofItem.get(item) ?? []) leaf.classList.add("hover");
  }

  click(event) {
    const row = event.target.closest("[role=treeitem]");
    if (!row) return;
    this.makeReachable(row);
    if (row.dataset.key !== undefined) this.choose(row.dataset.key);
    else this.unfold(row, row.getAttribute("aria-expanded") !== "true");
  }

  key(event) {
    const row = document.activeElement.closest("[role=treeitem]");
    if (!row || event.ctrlKey || event.metaKey || event.altKey) return;
    const rows = this.visible();
    const at = rows.indexOf(row);
    const open = row.getAttribute("aria-expanded");
    const actions = {
      ArrowDown: () => this.focus(rows[at + 1]),
      ArrowUp: () => this.focus(rows[at - 1]),
      Home: () => this.focus(rows[0]),
      End: () => this.focus(rows[rows.length - 1]),
      ArrowRight: () => (open === "false" ? this.unfold(row, true) : open === "true" && this.focus(rows[at + 1])),
      ArrowLeft: () => (open === "true" ? this.unfold(row, false) : this.focus(row.parentElement.closest("[role=treeitem]"))),
      Enter: () => this.click({ target: row }),
      " ": () => this.click({ target: row }),
    };
    if (!actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  }
}
