"use strict";
// Puts the page together, and again when another experiment, method or theme is chosen.
(() => {
  const { page, el } = stockpot;

  function head() {
    const x = page.now;
    const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
    const facts = [x.about.stream, x.about.scenario, plural(x.tasks.length, "task"), x.about.model, plural(x.seeds.length, "seed")];
    if (x.orders.length > 1) facts.push(plural(x.orders.length, "task order"));
    facts.push(`${x.finished} of ${plural(x.planned, "run")} finished${x.failed ? `, ${x.failed} failed` : ""}`);
    const nodes = [el("h1", {}, x.name), el("p", { class: "faint" }, facts.filter(Boolean).join(" · "))];
    if (page.experiments.length > 1) {
      const options = page.experiments.map((e, n) => [String(n), `${n + 1}. ${e.name}${page.experiments.filter((o) => o.name === e.name).length > 1 ? ` (${e.how[0].folder})` : ""}`]);
      nodes.unshift(el("div", { class: "controls" }, stockpot.select(`One of ${page.experiments.length} experiments:`, options, String(page.experiments.indexOf(x)), (value) => show(Number(value)))));
    }
    if (x.answer) nodes.push(el("p", { class: "answer", id: "answer" }, x.answer));
    if (x.gaps.length) {
      const list = el("ul", {}, ...x.gaps.slice(0, 40).map((gap) => el("li", {}, gap)), x.gaps.length > 40 ? el("li", {}, `and ${x.gaps.length - 40} more`) : null);
      const words = [el("b", {}, x.failed && x.gaps.length === x.failed ? "Some runs failed. " : "Not all of the record could be used. "), "What follows is made from the rest."];
      const shown = x.gaps.length > 4 ? el("details", {}, el("summary", {}, `${x.gaps.length} notes`), list) : list;
      nodes.push(el("div", { class: "warn", id: "gaps" }, ...words, shown));
    }
    document.getElementById("head").replaceChildren(...nodes);
  }
  function legend() {
    const holder = document.getElementById("legend");
    const chips = Object.entries(page.now.methods).map(([name, method]) => {
      const on = page.isolated === name;
      return el("button", { class: `chip${page.isolated && !on ? " off" : ""}`, "aria-pressed": String(on), "data-method": name, title: on ? "Show all methods" : `Show ${method.title} alone, with all its settings`, onclick: () => isolate(on ? null : name) }, stockpot.mark(name), method.title);
    });
    if (page.isolated) chips.push(el("button", { class: "chip", onclick: () => isolate(null) }, "show all"));
    holder.replaceChildren(...(chips.length > 1 ? chips : []));
  }
  function isolate(method) {
    page.isolated = method;
    update();
  }
  function update() {
    legend();
    (stockpot.tables || []).forEach((held) => held.fill());
    if (stockpot.matrices) stockpot.matrices.fill();
    stockpot.refresh();
  }
  function show(number) {
    for (const figure of page.figures) if (figure.seen) Plotly.purge(figure.node);
    page.figures = [];
    page.isolated = null;
    page.now = page.experiments[number];
    stockpot.matrices = null;
    document.getElementById("main").replaceChildren();
    head();
    legend();
    for (const add of ["Figures", "Plane", "Curves", "OneTask", "Loss", "Matrices", "Distances", "Line", "Costs", "Tables", "Running", "How"]) stockpot[`add${add}`]();
    document.title = `${page.now.name} · stockpot`;
  }
  stockpot.start = () => {
    const data = JSON.parse(document.getElementById("data").textContent);
    page.experiments = data.experiments;
    show(0);
    document.getElementById("foot").replaceChildren(el("p", { class: "faint" }, `Made by stockpot ${data.version} from the record as of ${data.made}. This file needs no network. Figures by plotly.js.`));
    stockpot.dark.addEventListener("change", update);
    let width = window.innerWidth;
    window.addEventListener("resize", () => { // labels are set for narrow or wide pages
      if (width < 620 !== window.innerWidth < 620 || width < 700 !== window.innerWidth < 700) stockpot.refresh();
      width = window.innerWidth;
    });
    document.documentElement.dataset.ready = "yes";
  };
})();
