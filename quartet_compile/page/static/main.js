// What is selected, searched for and filtered. The address keeps the selection, so that a link leads to a linear.

const byId = (id) => document.getElementById(id);

{
  const data = JSON.parse(byId("data").textContent);
  const articles = [...document.querySelectorAll("article")];
  const tree = new Tree(byId("tree"), data, (key) => go(key));
  const sources = byId("sources") && new Sources(data, (item) => go(tree.ofItem.get(item)[0].dataset.key), hover);
  let shownArticle;

  function go(key) {
    const hash = "#" + encodeURIComponent(key);
    if (location.hash === hash) select(key);
    else location.hash = hash;
  }

  function select(key) {
    const leaf = tree.ofKey.get(key);
    if (!leaf) return;
    const item = Number(leaf.dataset.item);
    tree.select(leaf);
    if (shownArticle) shownArticle.hidden = true;
    shownArticle = articles[item];
    shownArticle.hidden = false;
    const figure = shownArticle.querySelector("figure:empty");
    if (figure) {
      const number = figure.dataset.picture;
      for (const part of [`picture-${number}`, `notes-${number}`]) {
        const copy = byId(part)?.cloneNode(true);
        copy?.removeAttribute("id");
        if (copy) figure.append(copy);
      }
    }
    sources?.select(item);
  }

  function hover(items) {
    tree.hover(items);
    sources.hover(items);
  }

  function selectFromAddress() {
    let key;
    try {
      key = decodeURIComponent(location.hash.slice(1));
    } catch {
      return; // an address that nobody gets from this page
    }
    if (tree.ofKey.has(key)) select(key);
    else if (!shownArticle && tree.leaves.length) select((tree.leaves.find((leaf) => leaf.matches(".nvfp4")) ?? tree.leaves[0]).dataset.key);
  }

  const search = byId("search");
  const filters = [...document.querySelectorAll(".filter")];

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const states = new Set(filters.filter((button) => button.getAttribute("aria-pressed") === "true").map((button) => button.dataset.state));
    const shown = tree.filter(words, states);
    byId("shown").textContent = shown === tree.leaves.length ? `${shown} entries` : `${shown} of ${tree.leaves.length} entries`;
    byId("nothing").hidden = shown > 0;
  }

  search.addEventListener("input", filter);
  search.addEventListener("keydown", (event) => {
    const first = tree.visible().find((row) => row.dataset.key !== undefined);
    if (event.key === "Escape") {
      search.value = "";
      filter();
    } else if (event.key === "Enter" && first) go(first.dataset.key);
    else if (event.key === "ArrowDown") tree.focus(first);
    else return;
    event.preventDefault();
  });
  for (const button of filters) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      filter();
    });
  }
  for (const [id, open] of [["unfold", true], ["fold", false]]) {
    byId(id).addEventListener("click", () => tree.modules.forEach((module) => tree.unfold(module, open)));
  }
  tree.element.addEventListener("mouseover", (event) => {
    const item = event.target.closest(".leaf")?.dataset.item;
    sources?.hover(item === undefined ? [] : [Number(item)]);
  });
  tree.element.addEventListener("mouseleave", () => sources?.hover([]));
  byId("details").addEventListener("click", (event) => {
    const jump = event.target.closest(".jump");
    if (jump) sources.jump(jump.dataset.source, Number(jump.dataset.line));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
    event.preventDefault();
    search.focus();
    search.select();
  });
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "light" : "dark";
  });
  addEventListener("hashchange", selectFromAddress);
  filter();
  selectFromAddress();
}
