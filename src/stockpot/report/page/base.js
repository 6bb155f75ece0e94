"use strict";
// What all figures share: the data, the state, numbers as text, and drawing when in view.
const stockpot = (() => {
  const page = { experiments: [], now: null, isolated: null, figures: [] };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Elements. Names come from files, so text is always set as text.
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  }
  // Plotly reads a few tags, %{...} and $...$ in texts; names are to be shown as they are.
  const esc = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/%\{/g, "%&#123;").replace(/\$/g, "&#36;");
  const clip = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
  function wrap(text, width) {
    const lines = [""];
    for (const word of String(text).split(" ")) {
      const last = lines[lines.length - 1];
      if (last && last.length + word.length + 1 > width) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} ${word}` : word;
    }
    return lines.map((line) => esc(clip(line, width + 8))).join("<br>");
  }

  // Numbers. Math.min(...values) takes no more than some 100,000 values.
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  const known = (values) => values.filter((v) => v !== null && v !== undefined);
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  // Mean and half of the 95 % interval (Student's t); null if any value is missing.
  function interval(values) {
    if (!values.length || known(values).length < values.length) return null;
    const m = mean(values);
    const n = values.length;
    if (n === 1) return { mean: m, half: null, n };
    const variance = values.reduce((sum, v) => sum + (v - m) ** 2, 0) / (n - 1);
    return { mean: m, half: page.now.t[n] * Math.sqrt(variance / n), n };
  }
  function number(value, measure) {
    const text = (value * measure.scale).toFixed(measure.digits);
    return Number(text) === 0 ? text.replace("-", "") : text.replace("-", "−");
  }
  const withUnit = (text, unit) => (unit ? `${text} ${unit}` : text);
  const intervalText = (i, m) => withUnit(number(i.mean, m) + (i.half === null ? "" : ` ± ${number(i.half, m)}`), m.unit);
  const axisTitle = (name, unit) => (unit ? `${name} (${unit})` : name);
  const sign = () => (page.now.measure.better === "lower" ? -1 : 1);

  // Looks.
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (method) => (page.now.methods[method] || { colour: ["#444444", "#aaaaaa"] }).colour[dark.matches ? 1 : 0];
  const symbol = (method) => (page.now.methods[method] || { symbol: "circle" }).symbol;
  function faded(hex, alpha) {
    const part = (at) => parseInt(hex.slice(at, at + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  }
  // Viridis, which people with any colour vision can follow, without the end that the page's ground swallows.
  const RAMP = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
  function taskColour(n, count) {
    const [from, to] = dark.matches ? [0.3, 1] : [0, 0.86];
    const at = (from + (to - from) * (count > 1 ? n / (count - 1) : 0)) * (RAMP.length - 1);
    const low = Math.min(Math.floor(at), RAMP.length - 2);
    const mix = (i) => Math.round(parseInt(RAMP[low].slice(i, i + 2), 16) * (low + 1 - at) + parseInt(RAMP[low + 1].slice(i, i + 2), 16) * (at - low));
    return `#${[1, 3, 5].map((i) => mix(i).toString(16).padStart(2, "0")).join("")}`;
  }
  function layout(extra) {
    const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--faint"), automargin: true, ticks: "outside", tickcolor: css("--line"), title: { standoff: 8 } };
    const merged = {
      font: { family: "system-ui, sans-serif", size: 13, color: css("--ink") },
      paper_bgcolor: css("--card"), plot_bgcolor: css("--card"),
      margin: { l: 55, r: 15, t: 15, b: 45 }, hovermode: "closest", showlegend: false, autosize: true,
      dragmode: window.innerWidth < 700 ? false : "zoom",
      hoverlabel: { align: "left", bgcolor: css("--soft"), bordercolor: css("--line"), font: { color: css("--ink"), size: 13 } },
      ...extra,
    };
    for (const key of Object.keys(extra).filter((k) => /^[xy]axis/.test(k)).concat(["xaxis", "yaxis"])) {
      merged[key] = { ...axis, ...(extra[key] || {}) };
      const title = merged[key].title;
      if (title.text) { // in two lines where there is no room for one
        const room = key.startsWith("x") ? window.innerWidth / 10 : 44;
        merged[key].title = { ...axis.title, ...title, text: wrap(title.text, Math.min(room, 110)), font: { size: window.innerWidth < 620 ? 12.5 : 14 } };
      }
    }
    return merged;
  }

  // Figures: {id, title, kind, caption, controls, draw}. Drawn when they come into view.
  const waiting = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) queue.push(entry.target.figure);
    }
    if (queue.length) setTimeout(drawNext);
  }, { rootMargin: "300px" });
  const queue = [];
  function drawNext() { // one at a time, so that the page answers in between
    const figure = queue.shift();
    if (figure && !figure.seen && figure.node.isConnected) figure.show();
    if (queue.length) setTimeout(drawNext);
  }

  class Plot {
    // draw() returns {data, layout, note} or null if there is nothing to draw.
    constructor(name, draw, holder) {
      this.name = name;
      this.draw = draw;
      this.node = el("div", { class: "plot pending", id: `plot-${name}` }, "…");
      this.node.figure = this;
      this.note = el("p", { class: "caption" });
      holder.append(this.node, this.note);
      this.seen = false;
      page.figures.push(this);
      waiting.observe(this.node);
    }
    made() {
      const figure = this.draw();
      for (const trace of figure.data) {
        const method = trace.meta && trace.meta.method;
        if (method && page.isolated && method !== page.isolated) trace.visible = false;
      }
      return figure;
    }
    show() {
      waiting.unobserve(this.node);
      this.seen = true;
      const figure = this.made();
      this.node.classList.remove("pending");
      if (this.node.textContent === "…") this.node.textContent = "";
      this.note.replaceChildren(...[figure.note || ""].flat());
      this.node.style.height = `${figure.layout.height || 380}px`;
      Plotly.react(this.node, figure.data, layout({ height: 380, ...figure.layout }), { displayModeBar: false, responsive: true, doubleClick: "reset", scrollZoom: false });
      this.node.dataset.drawn = "yes";
    }
    refresh() {
      if (this.seen) this.show();
    }
    async download(format) {
      const figure = this.made();
      const looks = layout({ ...figure.layout, showlegend: figure.data.some((t) => t.showlegend !== false && t.name), title: { text: esc(`${page.now.name}: ${this.name.replace(/-/g, " ")}`), font: { size: 15 } } });
      looks.margin = { ...looks.margin, t: 60 };
      const width = 1100;
      const height = Math.max(figure.layout.height || 480, 480);
      const url = await Plotly.toImage({ data: figure.data, layout: { ...looks, width, height } }, { format, width, height, scale: format === "png" ? 2 : 1 });
      save(`${this.name}.${format}`, url);
    }
  }
  function save(name, url) {
    const link = el("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
  }
  function saveText(name, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
    save(name, url);
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }
  function card(id, title, kind = "") {
    const tools = el("div", { class: "tools" });
    const controls = el("div", { class: "controls" });
    const body = el("div");
    const node = el("section", { id, class: kind }, el("div", { class: "top" }, el("h2", {}, title), tools), controls, body);
    document.getElementById("main").append(node);
    return { node, tools, controls, body };
  }
  function figure(id, title, draw, { kind = "", caption = "" } = {}) {
    const held = card(id, title, kind);
    held.plot = new Plot(id, draw, held.body);
    if (caption) held.body.append(el("p", { class: "caption" }, caption));
    for (const format of ["png", "svg"]) {
      held.tools.append(el("button", { onclick: () => held.plot.download(format), title: `Save as ${format.toUpperCase()}` }, format.toUpperCase()));
    }
    return held;
  }
  // A labelled select; options are [value, text]. Calls back with the value.
  function select(label, options, value, change) {
    const node = el("select", { onchange: () => change(node.value) });
    for (const [key, text] of options) node.append(el("option", { value: key }, clip(text, 70)));
    node.value = value;
    return el("label", {}, label, node);
  }
  function check(label, checked, change) {
    const node = el("input", { type: "checkbox", onchange: () => change(node.checked) });
    node.checked = checked;
    return el("label", {}, node, label);
  }
  const refresh = () => page.figures.forEach((f) => f.refresh());

  // What of an experiment is shown.
  const runsOf = (group) => page.now.runs.filter((run) => run.group === group);
  const finishedOf = (group) => runsOf(group).filter((run) => run.finished);
  function best() { // the number of each method's setting with the best average
    const found = {};
    page.now.groups.forEach((group, n) => {
      const value = average(n);
      if (value === null || group["left out"]) return;
      const held = found[group.method];
      if (held === undefined || sign() * (value.mean - average(held).mean) > 0) found[group.method] = n;
    });
    return found;
  }
  function average(group) {
    const runs = finishedOf(group);
    return runs.length ? interval(runs.map((run) => run.metrics.average)) : null;
  }
  // One setting a method, or all of the isolated one.
  function shownGroups() {
    const picked = best();
    if (!page.isolated) return Object.values(picked).sort((a, b) => a - b);
    return page.now.groups.map((_, n) => n).filter((n) => page.now.groups[n].method === page.isolated && finishedOf(n).length);
  }
  function hover(group, rows) {
    return [`<b>${esc(page.now.groups[group].title)}</b>`, ...rows.map(esc)].join("<br>");
  }
  const orderText = (run) => (page.now.orders.length > 1 ? `, task order ${run.order + 1}` : "");
  // The column of task n (of the first order) in a run's own R.
  const columnOf = (run, n) => page.now.orders[run.order].indexOf(n);
  // What goes along the stream is shown for one task order: the first that a group's runs have.
  const orderOf = (group) => Math.min(...runsOf(group).map((run) => run.order));
  const inOneOrder = (group) => runsOf(group).filter((run) => run.order === orderOf(group));
  function scoresText(run) {
    const last = run.R[run.R.length - 1];
    return page.now.tasks.slice(0, 8).map((task, n) => {
      const value = last && last[columnOf(run, n)];
      return `${clip(task, 30)}: ${value === null || value === undefined ? "–" : withUnit(number(value, page.now.measure), page.now.measure.unit)}`;
    }).concat(page.now.tasks.length > 8 ? [`and ${page.now.tasks.length - 8} more tasks`] : []);
  }
  return { page, dark, el, esc, clip, wrap, known, least, most, mean, interval, number, withUnit, intervalText, axisTitle, sign, css, colour, symbol, faded, taskColour, layout, figure, card, Plot, select, check, refresh, saveText, runsOf, finishedOf, best, average, shownGroups, hover, orderText, columnOf, orderOf, inOneOrder, scoresText };
})();
