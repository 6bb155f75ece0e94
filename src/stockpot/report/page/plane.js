"use strict";
// The trade-off plane of any two tasks or groups of tasks (Figs. 3 to 9), its Pareto set and hypervolume.
(() => {
  const { page, el, esc, clip, mean, interval, number, withUnit, intervalText, css, colour, symbol, faded, finishedOf, hover, orderText } = stockpot;
  const state = { x: "last", y: "earlier", severalX: [], severalY: [], seeds: false, bars: true, front: true };

  // What an axis is: a name, and the positions (columns of a run's own R) that it is the mean of.
  function axisOf(key, several) {
    const tasks = page.now.tasks;
    const count = tasks.length;
    if (key === "last") return { name: page.now.orders.length > 1 ? "the last task" : `the last task, ${tasks[count - 1]}`, columns: () => [count - 1] };
    if (key === "earlier") {
      const name = page.now.orders.length > 1 ? `mean of the ${count - 1} earlier tasks` : count === 2 ? tasks[0] : `mean of the ${count - 1} earlier tasks`;
      return { name, columns: () => tasks.map((_, n) => n).slice(0, -1) };
    }
    if (key === "first") return { name: page.now.orders.length > 1 ? "the first task" : `the first task, ${tasks[0]}`, columns: () => [0] };
    if (key === "all") return { name: `mean of all ${count} tasks`, columns: () => tasks.map((_, n) => n) };
    const picked = key === "several" ? (several.length ? several : [0]) : [Number(key)];
    const name = picked.length === 1 ? tasks[picked[0]] : `mean of ${picked.map((n) => clip(tasks[n], 18)).slice(0, 4).join(", ")}${picked.length > 4 ? ` and ${picked.length - 4} more` : ""}`;
    return { name, columns: (run) => picked.map((n) => stockpot.columnOf(run, n)) };
  }
  function scoreOf(run, axis, row) {
    const scores = row || run.R[run.R.length - 1];
    return scores ? mean(axis.columns(run).map((c) => scores[c])) : null;
  }
  function points(x, y) {
    return page.now.groups.map((_, group) => {
      const runs = finishedOf(group);
      if (!runs.length) return null;
      return { group, runs, x: interval(runs.map((run) => scoreOf(run, x))), y: interval(runs.map((run) => scoreOf(run, y))) };
    }).filter(Boolean);
  }
  const YARDSTICKS = ["multitask", "rehearsal"];
  // The points that no other is better than in one way and at least as good in the other.
  function pareto(all, better) {
    const s = better === "lower" ? -1 : 1;
    return all.filter((p) => !all.some((q) => s * q.x.mean >= s * p.x.mean && s * q.y.mean >= s * p.y.mean && (q.x.mean !== p.x.mean || q.y.mean !== p.y.mean)))
      .sort((a, b) => a.x.mean - b.x.mean);
  }
  // The share of the box from the reference to the ideal that the points dominate (Zitzler and Thiele 1999).
  function hypervolume(all, reference, ideal) {
    const scaled = all.map((p) => [(p.x.mean - reference[0]) / (ideal[0] - reference[0]), (p.y.mean - reference[1]) / (ideal[1] - reference[1])])
      .map(([a, b]) => [Math.min(Math.max(a, 0), 1), Math.min(Math.max(b, 0), 1)]).sort((a, b) => b[0] - a[0]);
    let volume = 0;
    let top = 0;
    scaled.forEach(([a, b], n) => {
      top = Math.max(top, b);
      const next = n + 1 < scaled.length ? scaled[n + 1][0] : 0;
      volume += (a - next) * top;
    });
    return volume;
  }
  stockpot.plane = { pareto, hypervolume };

  function box(x, y) { // the reference point and the ideal, with words for them
    if (page.now.measure.unit === "%") return { reference: [0, 0], ideal: [1, 1], words: "from 0 to 100 % on both axes" };
    const starts = page.now.runs.filter((run) => run.b);
    if (!starts.length) return null;
    return { reference: [mean(starts.map((run) => scoreOf(run, x, run.b))), mean(starts.map((run) => scoreOf(run, y, run.b)))], ideal: [0, 0], words: "from the starting model to a loss of 0" };
  }
  function marks(all) { // one trace of points a method
    const m = page.now.measure;
    const s = m.scale;
    const labels = new Map();
    for (const curve of page.now.curves) {
      if (curve.along) curve.groups.forEach((g, i) => { if (!labels.has(g)) labels.set(g, String(curve.values[i])); });
    }
    return Object.keys(page.now.methods).map((method) => {
      const own = all.filter((p) => page.now.groups[p.group].method === method);
      if (!own.length) return null;
      const spread = (key) => ({ type: "data", visible: state.bars, array: own.map((p) => (p[key].half || 0) * s), color: faded(colour(method), 0.35), thickness: 1, width: 0 });
      return {
        type: "scatter", mode: "markers+text", x: own.map((p) => p.x.mean * s), y: own.map((p) => p.y.mean * s), name: page.now.methods[method].title, meta: { method, points: own.length },
        error_x: spread("x"), error_y: spread("y"),
        text: own.map((p) => (window.innerWidth < 620 ? "" : labels.get(p.group) || "")), textposition: "top right", textfont: { size: 10.5, color: css("--faint") }, cliponaxis: false,
        marker: { color: colour(method), symbol: own.map((p) => symbol(method) + (page.now.groups[p.group]["left out"] ? "-open" : "")), size: method === "multitask" ? 16 : 10, line: { color: css("--card"), width: 1 } },
        hovertemplate: own.map((p) => `${hover(p.group, [`across: ${intervalText(p.x, m)}`, `up: ${intervalText(p.y, m)}`, `${p.x.n} run${p.x.n > 1 ? "s" : ""} (seed ${p.runs.map((r) => r.seed).join(", ")})`])}<extra></extra>`),
      };
    }).filter(Boolean);
  }
  function lines(all) { // the curves along a setting
    const s = page.now.measure.scale;
    const at = new Map(all.map((p) => [p.group, p]));
    const dashes = ["solid", "dash", "dot", "dashdot"];
    const drawn = {};
    return page.now.curves.filter((c) => c.along && c.groups.length > 1).map((curve) => {
      const own = curve.groups.map((g) => at.get(g)).filter(Boolean);
      drawn[curve.method] = (drawn[curve.method] || 0) + 1;
      return { type: "scatter", mode: "lines", x: own.map((p) => p.x.mean * s), y: own.map((p) => p.y.mean * s), name: esc(curve.label), meta: { method: curve.method, points: 0 }, hoverinfo: "skip", line: { color: colour(curve.method), width: 2, dash: dashes[(drawn[curve.method] - 1) % 4] } };
    });
  }
  function seedDots(all, x, y) {
    const m = page.now.measure;
    return Object.keys(page.now.methods).map((method) => {
      const runs = all.filter((p) => page.now.groups[p.group].method === method).flatMap((p) => p.runs.map((run) => [p.group, run]));
      return {
        type: "scatter", mode: "markers", showlegend: false, meta: { method, points: runs.length, seeds: true }, x: runs.map(([, r]) => scoreOf(r, x) * m.scale), y: runs.map(([, r]) => scoreOf(r, y) * m.scale),
        marker: { size: 5, color: colour(method), opacity: 0.5, symbol: symbol(method) },
        hovertemplate: runs.map(([g, r]) => `${hover(g, [`seed ${r.seed}${orderText(r)}`, `across: ${withUnit(number(scoreOf(r, x), m), m.unit)}`, `up: ${withUnit(number(scoreOf(r, y), m), m.unit)}`])}<extra></extra>`),
      };
    });
  }
  // Dotted: the starting model. Dashed: training on that task alone.
  function references(x, y) {
    const s = page.now.measure.scale;
    const shapes = [];
    const notes = [];
    const starts = page.now.runs.filter((run) => run.b);
    const line = (axis, value, dash) => {
      const across = axis === "x" ? { x0: value, x1: value, yref: "paper", y0: 0, y1: 1 } : { y0: value, y1: value, xref: "paper", x0: 0, x1: 1 };
      shapes.push({ type: "line", layer: "below", line: { dash, width: 1.3, color: css("--faint") }, ...across });
    };
    for (const [name, axis] of [["x", x], ["y", y]]) {
      if (starts.length) line(name, mean(starts.map((run) => scoreOf(run, axis, run.b))) * s, "dot");
      const columns = axis.columns({ order: 0 });
      const alone = columns.map((c) => Object.hasOwn(page.now.single, page.now.tasks[c]) && page.now.single[page.now.tasks[c]]);
      if (alone.every(Boolean)) {
        line(name, mean(alone.map((a) => a.value)) * s, "dash");
        notes.push(name);
      }
    }
    return { shapes, dashed: notes };
  }
  function ranges(traces, shapes) { // everything is in view: points, intervals and lines of reference
    const all = { x: [], y: [] };
    for (const trace of traces) {
      for (const key of ["x", "y"]) {
        const error = state.bars && trace[`error_${key}`] ? trace[`error_${key}`].array : [];
        trace[key].forEach((v, i) => all[key].push(v - (error[i] || 0), v + (error[i] || 0)));
      }
    }
    for (const shape of shapes) (shape.xref === "paper" ? all.y : all.x).push(shape.xref === "paper" ? shape.y0 : shape.x0);
    const lower = page.now.measure.better === "lower";
    const span = (values) => {
      let [low, high] = [Math.min(...values), Math.max(...values)];
      if (page.now.measure.unit === "%") [low, high] = [Math.max(low, 0), Math.min(high, 100)]; // an interval may reach where no share can be
      const pad = (high - low || Math.abs(high) || 1) * 0.06;
      return lower ? [high + pad, low - pad] : [low - pad, high + pad];
    };
    return [span(all.x), span(all.y)];
  }
  function drawPlane() {
    const m = page.now.measure;
    const s = m.scale;
    const x = axisOf(state.x, state.severalX);
    const y = axisOf(state.y, state.severalY);
    const all = points(x, y);
    const competitors = all.filter((p) => !YARDSTICKS.includes(page.now.groups[p.group].method));
    const data = [...lines(all), ...marks(all)];
    if (state.seeds) data.push(...seedDots(all, x, y));
    const { shapes, dashed } = references(x, y);
    const [xRange, yRange] = ranges(data.filter((t) => t.x.length), shapes);
    const front = pareto(competitors, m.better);
    if (state.front && front.length) {
      data.unshift({ type: "scatter", mode: "lines", name: "Pareto set", x: front.map((p) => p.x.mean * s), y: front.map((p) => p.y.mean * s), line: { shape: m.better === "lower" ? "hv" : "vh", color: faded(css("--ink").length === 7 ? css("--ink") : "#888888", 0.28), width: 7 }, hoverinfo: "skip", meta: { points: 0, front: front.map((p) => p.group) } });
    }
    return {
      data,
      layout: {
        height: window.innerWidth < 620 ? 430 : 620, shapes,
        xaxis: { title: { text: `${m.name} on ${clip(x.name, 90)} (${m.unit})` }, range: xRange, zeroline: false },
        yaxis: { title: { text: `${m.name} on ${clip(y.name, 70)} (${m.unit})` }, range: yRange, zeroline: false },
      },
      note: notes(competitors, front, x, y, dashed),
    };
  }
  function notes(competitors, front, x, y, dashed) {
    const found = [`Further up and further right is better${page.now.measure.better === "lower" ? " (the axes of a loss run backwards)" : ""}. Each point is a method at one setting, mean over its runs${state.bars ? " with 95 % intervals" : ""}${window.innerWidth < 620 ? "" : "; a number beside it is the value of the setting its curve runs along"}. Dotted lines: the starting model.`];
    if (dashed.length) found.push(" Dashed lines: a model trained on that alone.");
    if (state.front) found.push(` Grey line: the Pareto set of the methods that keep no old data (${front.length} setting${front.length === 1 ? "" : "s"}): no other setting of the means shown is better on one axis and as good on the other; chance is not taken into account.`);
    const frame = box(x, y);
    if (frame) {
      const volumes = Object.keys(page.now.methods).map((method) => [method, competitors.filter((p) => page.now.groups[p.group].method === method)]).filter(([, own]) => own.length)
        .map(([method, own]) => [page.now.methods[method].title, hypervolume(own, frame.reference, frame.ideal)]).sort((a, b) => b[1] - a[1]);
      const text = [["all of them", hypervolume(competitors, frame.reference, frame.ideal)], ...volumes].map(([name, v]) => `${name} ${v.toFixed(3)}`).join(", ");
      found.push(el("br"), el("b", {}, "Hypervolume"), ` (share of the box ${frame.words} that a method's settings dominate; 1 is all of it): `, el("span", { id: "hypervolume" }, text), ". Methods with more settings have it easier.");
    }
    return found;
  }

  function several(which, held) {
    const box = el("div", { class: "several" }, el("span", { class: "faint" }, which === "severalX" ? "across:" : "up:"));
    page.now.tasks.forEach((task, n) => box.append(stockpot.check(clip(task, 40), state[which].includes(n), (on) => {
      state[which] = on ? [...state[which], n].sort((a, b) => a - b) : state[which].filter((t) => t !== n);
      held.plot.refresh();
    })));
    return box;
  }
  stockpot.addPlane = () => {
    if (page.now.tasks.length < 2 || !page.now.runs.some((run) => run.finished)) return;
    Object.assign(state, { x: "last", y: "earlier", severalX: [page.now.tasks.length - 1], severalY: [0] });
    const held = stockpot.figure("plane", "Kept against learned", drawPlane);
    const options = [["last", "the last task"], ["earlier", "the earlier tasks (mean)"], ["first", "the first task"], ["all", "all tasks (mean)"], ...page.now.tasks.map((t, n) => [String(n), t]), ["several", "several tasks…"]];
    function controls() {
      const set = (key) => (value) => { state[key] = value; controls(); held.plot.refresh(); };
      const flag = (key) => (on) => { state[key] = on; held.plot.refresh(); };
      held.controls.replaceChildren(stockpot.select("across", options, state.x, set("x")), stockpot.select("up", options, state.y, set("y")),
        stockpot.check("intervals", state.bars, flag("bars")), stockpot.check("each run", state.seeds, flag("seeds")), stockpot.check("Pareto set", state.front, flag("front")));
      if (state.x === "several") held.controls.append(several("severalX", held));
      if (state.y === "several") held.controls.append(several("severalY", held));
    }
    controls();
  };
})();
