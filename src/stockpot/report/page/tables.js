"use strict";
// Sortable tables with downloads, and how the experiment was made.
(() => {
  const { page, el, esc, number, colour, symbol } = stockpot;
  const SHAPES = { circle: "M8 2a6 6 0 1 0 .01 0z", square: "M2.5 2.5h11v11h-11z", diamond: "M8 1l7 7-7 7-7-7z", cross: "M5.5 1.5h5v4h4v5h-4v4h-5v-4h-4v-5h4z", x: "M2 5l3-3 3 3 3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3z", "triangle-up": "M8 2l7 12H1z", "triangle-down": "M8 14L1 2h14z", "triangle-left": "M2 8l12-7v14z", "triangle-right": "M14 8L2 1v14z", pentagon: "M8 1l7 5.2-2.7 8.3H3.7L1 6.2z", star: "M8 .8l2.2 4.7 5.1.6-3.8 3.5 1 5.1L8 12.2l-4.5 2.5 1-5.1L.7 6.1l5.1-.6z" };
  stockpot.mark = (method) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 16 16");
    svg.setAttribute("aria-hidden", "true");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("d", SHAPES[symbol(method)] || SHAPES.circle);
    path.setAttribute("fill", colour(method));
    svg.append(path);
    return svg;
  };

  function table(id, title, columns, rows, texts, caption) { // rows: [title, method, cells, note]
    const held = stockpot.card(id, title);
    const sort = { column: null, down: false };
    const body = el("tbody");
    const heads = columns.map((column, n) => {
      const button = el("button", { onclick: () => by(n), title: "Sort by this column" }, column.title, el("small", {}, column.unit || " "));
      return el("th", { scope: "col" }, button);
    });
    const first = el("th", { scope: "col" }, el("button", { onclick: () => by(null), title: "The experiment's own order" }, "method", el("small", {}, " ")));
    held.body.append(el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, first, ...heads)), body)), el("p", { class: "caption" }, caption));
    function by(n) {
      const better = n === null ? "" : columns[n].better;
      if (sort.column === n) sort.down = !sort.down;
      else Object.assign(sort, { column: n, down: better === "higher" });
      heads.forEach((head, k) => (k === n ? head.setAttribute("aria-sort", sort.down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
      fill();
    }
    function bestOf(n) {
      const values = rows.map((row) => row[2][n]).filter(Boolean).map((cell) => cell[0]);
      if (!columns[n].better || values.length < 2) return null;
      return columns[n].better === "higher" ? Math.max(...values) : Math.min(...values);
    }
    const bests = columns.map((_, n) => bestOf(n));
    function fill() {
      const shown = rows.filter((row) => !page.isolated || row[1] === page.isolated);
      if (sort.column !== null) {
        const value = (row) => (row[2][sort.column] ? row[2][sort.column][0] : null);
        shown.sort((p, q) => (value(p) === null ? 1 : value(q) === null ? -1 : (sort.down ? -1 : 1) * (value(p) - value(q))));
      }
      body.replaceChildren(...shown.map(([name, method, cells, note]) => el("tr", {}, el("td", { title: name }, el("span", { class: "dot" }, stockpot.mark(method), name), note ? el("i", {}, ` ${note}`) : null),
        ...columns.map((column, n) => {
          const cell = cells[n];
          if (!cell) return el("td", {}, "–");
          const own = cell[1] === null ? null : el("i", {}, ` ±${number(cell[1], column)}`);
          return el("td", { class: cell[0] === bests[n] ? "best" : "", title: cell[2] > 1 ? `mean of ${cell[2]} runs ± half of a 95 % interval` : "one run" }, number(cell[0], column), own);
        }))));
    }
    for (const [kind, label] of [["csv", "CSV"], ["tex", "LaTeX"], ["md", "Markdown"]]) {
      held.tools.append(el("button", { onclick: () => stockpot.saveText(`${texts.name}.${kind}`, texts[kind]), title: `Save as ${label}` }, label));
    }
    fill();
    held.fill = fill;
    return held;
  }
  stockpot.addTables = () => {
    stockpot.tables = [];
    for (const texts of page.now.tables) {
      const main = texts.name === "results";
      const columns = main ? page.now.columns : texts.columns;
      const rows = main ? page.now.groups.map((g) => [g.title, g.method, g.cells, g.n ? "" : "not finished"]) : texts.rows;
      const over = page.now.orders.length > 1 ? "seeds and task orders" : "seeds";
      const caption = `Mean over ${over}, ± half of a 95 % interval (Student's t over runs; none with one run). ${main ? "Scores at the end of the stream. " : "Every benchmark of every task at the end of the stream, as the paper's tables have them. "}Bold: the best mean of a column, whatever its interval. Press a column's head to sort.`;
      stockpot.tables.push(table(main ? "results" : "benchmarks", main ? "All numbers" : "Benchmark by benchmark", columns, rows, texts, caption));
    }
  };

  stockpot.addRunning = () => {
    const open = page.now.runs.filter((run) => !run.finished && !run.failed);
    if (!open.length) return;
    const held = stockpot.card("running", `Not finished: ${open.length} of ${page.now.planned} runs`);
    const m = page.now.measure;
    const begun = open.filter((run) => run.R.some((row) => row));
    held.body.append(el("div", { class: "bar" }, el("div", { style: `width:${(100 * page.now.finished) / Math.max(1, page.now.planned)}%` })));
    for (const run of begun.slice(0, 8)) {
      const done = run.R.filter((row) => row).length;
      const at = run.R.map((row) => Boolean(row)).lastIndexOf(true);
      const seen = run.R[at].slice(0, at + 1).filter((v) => v !== null);
      held.body.append(el("p", { class: "faint" }, `${run.id}: ${done} of ${page.now.tasks.length} tasks, average so far ${seen.length ? stockpot.withUnit(number(stockpot.mean(seen), m), m.unit) : "unknown"}`));
    }
    const waiting = open.length - Math.min(begun.length, 8);
    if (waiting) held.body.append(el("p", { class: "faint" }, `${waiting} more have ${begun.length ? "" : "not begun, or have "}no finished task to show here. Made from the record as it was; stockpot report makes this page again.`));
  };

  stockpot.addHow = () => {
    const held = stockpot.card("how", "How it was made");
    const facts = [`${page.now.about.stream}; scenario: ${page.now.about.scenario || "not stated"}; model: ${page.now.about.model}; seeds ${page.now.seeds.join(", ")}`];
    const inOrder = (tasks) => tasks.slice(0, 40).join(" → ") + (tasks.length > 40 ? ` → and ${tasks.length - 40} more` : "");
    if (page.now.orders.length > 1) page.now.orders.forEach((order, n) => facts.push(`task order ${n + 1}: ${inOrder(order.map((t) => page.now.tasks[t]))}`));
    else facts.push(`tasks in order: ${inOrder(page.now.tasks)}`);
    held.body.append(...facts.map((text) => el("p", {}, text)));
    for (const how of page.now.how) {
      if (page.now.how.length > 1) held.body.append(el("h3", {}, how.folder));
      if (how.command) held.body.append(el("pre", {}, `$ ${how.command}`));
      for (const note of [...how.notes, ...how["left out"].map((name) => `${name} was left out`)]) held.body.append(el("p", { class: "faint" }, note));
      held.body.append(el("details", {}, el("summary", {}, "Versions, hardware, source"), el("pre", {}, JSON.stringify(how.environment, null, 2))));
      if (how.experiment) {
        held.body.append(el("details", {}, el("summary", {}, "The experiment, every default written out (it can be run as it is)"), el("pre", {}, how.experiment)));
        held.tools.append(el("button", { onclick: () => stockpot.saveText("experiment.yaml", how.experiment) }, "YAML"));
      }
    }
  };
})();
