"use strict";
// Bars of the final average (Fig. 1), score matrices, distance against forgetting (Fig. 10), costs.
(() => {
  const { page, el, esc, wrap, least, most, mean, interval, number, withUnit, intervalText, axisTitle, css, colour, symbol, faded, finishedOf, best, average, shownGroups, hover, orderText, scoresText } = stockpot;
  const narrow = () => window.innerWidth < 620;
  const rowLabel = (group) => wrap(page.now.groups[group].title, narrow() ? 17 : 34);
  const yardstick = (group) => page.now.groups[group].method === "multitask" && !page.now.groups[group]["left out"];

  // Fig. 1.
  const bars = { all: false };
  function barGroups() {
    if (!bars.all) return shownGroups();
    return page.now.groups.map((_, n) => n).filter((n) => finishedOf(n).length && (!page.isolated || page.now.groups[n].method === page.isolated));
  }
  function drawBars() {
    const m = page.now.measure;
    const s = m.scale;
    const groups = barGroups().filter((n) => average(n)).sort((a, b) => stockpot.sign() * (average(a).mean - average(b).mean));
    const rows = new Map(groups.map((n, row) => [n, row]));
    const data = [];
    const shapes = [];
    const rehearsal = page.now.groups.map((_, n) => n).filter((n) => page.now.groups[n].method === "rehearsal" && finishedOf(n).length && (!page.isolated || page.isolated === "rehearsal")).map((n) => average(n).mean * s);
    if (rehearsal.length) shapes.push({ type: "rect", yref: "paper", y0: 0, y1: 1, x0: Math.min(...rehearsal), x1: Math.max(...rehearsal), fillcolor: faded(colour("rehearsal"), 0.2), line: { width: 1, color: faded(colour("rehearsal"), 0.5) }, layer: "below" });
    for (const method of new Set(groups.map((n) => page.now.groups[n].method))) {
      const own = groups.filter((n) => page.now.groups[n].method === method);
      const stars = own.filter(yardstick);
      for (const [part, star] of [[own.filter((n) => !yardstick(n)), false], [stars, true]]) {
        if (!part.length) continue;
        const values = part.map(average);
        const common = {
          x: values.map((v) => v.mean * s), y: part.map((n) => rows.get(n)), meta: { method, points: part.length },
          name: page.now.methods[method].title, showlegend: true, legendgroup: method,
          error_x: { type: "data", array: values.map((v) => (v.half || 0) * s), color: css("--ink"), thickness: 1.2, width: 3 },
          hovertemplate: part.map((n, i) => `${hover(n, [`average: ${intervalText(values[i], m)}`, `${values[i].n} run${values[i].n > 1 ? "s" : ""}`, ...finalRows(n)])}<extra></extra>`),
        };
        if (star) data.push({ ...common, type: "scatter", mode: "markers", marker: { symbol: "star", size: 17, color: colour(method), line: { color: css("--card"), width: 1 } } });
        else data.push({ ...common, type: "bar", orientation: "h", width: 0.66, marker: { color: faded(colour(method), 0.82), line: { color: colour(method), width: 1 } } });
        if (star) shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: values[0].mean * s, x1: values[0].mean * s, line: { dash: "dot", width: 1.5, color: colour(method) }, layer: "below" });
      }
      const runs = own.flatMap((n) => finishedOf(n).map((run) => [n, run]));
      data.push({
        type: "scatter", mode: "markers", x: runs.map(([, run]) => run.metrics.average * s), y: runs.map(([n]) => rows.get(n)), meta: { method, points: runs.length, seeds: true }, showlegend: false,
        marker: { size: 6, symbol: "circle-open", color: css("--ink"), opacity: 0.65 },
        hovertemplate: runs.map(([n, run]) => `${hover(n, [`seed ${run.seed}${orderText(run)}`, `average: ${withUnit(number(run.metrics.average, m), m.unit)}`, ...scoresText(run)])}<extra></extra>`),
      });
    }
    const ends = groups.flatMap((n) => [average(n).mean + (average(n).half || 0), ...finishedOf(n).map((run) => run.metrics.average)]).map((v) => v * s);
    const high = m.unit === "%" ? Math.min(Math.max(...ends) * 1.04, 102) : Math.max(...ends) * 1.05; // an interval may reach where no share can be
    return {
      data,
      layout: {
        height: Math.max(190, groups.length * (narrow() ? 40 : 27) + 80), bargap: 0.3, shapes,
        xaxis: { title: { text: axisTitle(`average ${m.name} at the end`, m.unit) }, range: [Math.min(0, ...ends), high] },
        yaxis: { tickvals: [...rows.values()], ticktext: groups.map((n) => `${rowLabel(n)}  <b>${number(average(n).mean, m)}</b>`), range: [-0.7, groups.length - 0.3], ticks: "", tickfont: { size: narrow() ? 11 : 12.5 }, showgrid: false, zeroline: false },
      },
      note: `Mean over seeds${page.now.orders.length > 1 ? " and task orders" : ""} of the average over all tasks after the last one; ${m.better === "higher" ? "longer" : "shorter"} is better. Lines are 95 % intervals, circles single runs.${stars(groups) ? " Star and dotted line: multitask, which sees all tasks at once." : ""}${rehearsal.length > 1 ? " Band: rehearsal at all its settings, which keeps old data." : rehearsal.length ? " Pink line: rehearsal, which keeps old data." : ""}${bars.all ? "" : " Each method at the setting with its best average, picked on these scores."}`,
    };
  }
  const stars = (groups) => groups.some(yardstick);
  function finalRows(group) {
    const m = page.now.measure;
    return page.now.tasks.slice(0, 6).map((task, n) => {
      const value = interval(finishedOf(group).map((run) => run.R[run.R.length - 1][stockpot.columnOf(run, n)]));
      return value ? `${stockpot.clip(task, 30)}: ${intervalText(value, m)}` : "";
    }).filter(Boolean).concat(page.now.tasks.length > 6 ? [`and ${page.now.tasks.length - 6} more tasks`] : []);
  }

  // Score matrices.
  function matrixOf(group) { // mean over the runs of one task order
    const runs = stockpot.inOneOrder(group);
    return page.now.tasks.map((_, t) => {
      const rows = runs.map((run) => run.R[t]).filter((row) => row);
      return page.now.tasks.map((_, i) => {
        const cells = rows.map((row) => row[i]).filter((v) => v !== null);
        return cells.length ? mean(cells) * page.now.measure.scale : null;
      });
    });
  }
  function runsOfCell(group, t, i) { // seeds that score samples of the tasks score different ones
    const count = stockpot.inOneOrder(group).filter((run) => run.R[t] && run.R[t][i] !== null).length;
    return `mean of ${count} run${count > 1 ? "s" : ""}`;
  }
  function matrixGroups() {
    const picked = best();
    page.now.groups.forEach((group, n) => { // of a method with no finished run, one that has begun
      if (picked[group.method] === undefined && stockpot.runsOf(n).some((run) => run.R.some((row) => row))) picked[group.method] = n;
    });
    if (!page.isolated) return Object.values(picked).sort((a, b) => a - b);
    return page.now.groups.map((_, n) => n).filter((n) => page.now.groups[n].method === page.isolated && stockpot.runsOf(n).some((run) => run.R.some((row) => row))).slice(0, 16);
  }
  function drawMatrix(group, limits) {
    const m = page.now.measure;
    const z = matrixOf(group);
    const tasks = page.now.orders[stockpot.orderOf(group)].map((n) => page.now.tasks[n]);
    const few = tasks.length <= 8;
    const axis = few
      ? { tickvals: tasks.map((_, n) => n), ticktext: tasks.map((t) => esc(stockpot.clip(t, 14))), tickangle: tasks.length <= 3 ? 0 : -40 }
      : { tickvals: tasks.map((_, n) => n).filter((n) => n % Math.ceil(tasks.length / 6) === 0), ticktext: tasks.map((_, n) => n + 1).filter((n) => (n - 1) % Math.ceil(tasks.length / 6) === 0) };
    return {
      data: [{
        type: "heatmap", z, zmin: limits[0], zmax: limits[1], colorscale: "Viridis", reversescale: m.better === "lower", xgap: few ? 2 : 0.5, ygap: few ? 2 : 0.5, showlegend: false, meta: { points: z.flat().filter((v) => v !== null).length },
        text: z.map((row) => row.map((v) => (v === null ? "" : v.toFixed(m.unit === "%" ? 0 : 2)))), texttemplate: few ? "%{text}" : "", textfont: { size: 12 },
        hoverongaps: false,
        customdata: tasks.map((after, t) => tasks.map((on, i) => [`after ${esc(after)}<br>on ${esc(on)}`, runsOfCell(group, t, i)])),
        hovertemplate: `<b>${esc(page.now.groups[group].title)}</b><br>%{customdata[0]}: %{z:.${m.digits}f} ${m.unit}<br>%{customdata[1]}<extra></extra>`,
        colorbar: { thickness: 9, outlinewidth: 0, title: { text: esc(m.unit) }, tickfont: { size: 11 } },
      }],
      layout: {
        height: 300, margin: { l: 40, r: 5, t: 8, b: 40 },
        xaxis: { ...axis, title: { text: "scored on" }, constrain: "domain", showgrid: false, zeroline: false },
        yaxis: { ...axis, tickangle: 0, title: { text: "trained through" }, autorange: "reversed", showgrid: false, zeroline: false },
      },
    };
  }
  function matrices() {
    const held = stockpot.card("matrices", "Score matrices: what each task did to all others");
    const holder = el("div", { class: "maps" });
    held.body.append(holder, el("p", { class: "caption" }, "Row: after training through that task. Column: the task scored. Below the diagonal is what was kept; empty rows were not trained (yet), empty cells not scored. All matrices share one colour scale."));
    function fill() {
      page.figures = page.figures.filter((f) => !f.name.startsWith("matrix-"));
      holder.replaceChildren();
      const m = page.now.measure;
      const groups = matrixGroups();
      const values = groups.flatMap((n) => matrixOf(n).flat()).filter((v) => v !== null);
      const limits = m.unit === "%" ? [Math.min(0, least(values)), Math.max(100, most(values))] : [least(values), most(values)];
      for (const n of groups) {
        const tools = el("div", { class: "tools" });
        const node = el("div", { class: "map" }, el("div", { class: "top" }, el("h3", {}, page.now.groups[n].title), tools));
        holder.append(node);
        const plot = new stockpot.Plot(`matrix-${n}`, () => drawMatrix(n, limits), node);
        for (const format of ["png", "svg"]) tools.append(el("button", { onclick: () => plot.download(format) }, format.toUpperCase()));
      }
    }
    fill();
    held.fill = fill;
    return held;
  }

  // Fig. 10: one panel for the distance of the weights, one for that of the answers.
  function drawDistance(kind) {
    const m = page.now.measure;
    const found = page.now.movement[kind];
    const data = [];
    for (const method of Object.keys(page.now.methods)) {
      const points = found.points.filter((p) => page.now.groups[p.group].method === method);
      if (!points.length) continue;
      data.push({
        type: "scatter", mode: "markers", x: points.map((p) => p.x), y: points.map((p) => p.lost * m.scale), name: page.now.methods[method].title, meta: { method, points: points.length },
        marker: { color: colour(method), symbol: symbol(method), size: points.length > 60 ? 6 : 9, opacity: points.length > 60 ? 0.6 : 0.9, line: { color: css("--card"), width: 0.7 } },
        hovertemplate: points.map((p) => `${hover(p.group, [`after ${page.now.tasks[p.row]}, mean of ${p.n} run${p.n > 1 ? "s" : ""}`, `${found.title}: ${p.x.toPrecision(3)} ${found.unit}`, `lost on earlier tasks: ${withUnit(number(p.lost, m), m.difference)}`])}<extra></extra>`),
      });
    }
    return {
      data,
      layout: {
        height: 400,
        xaxis: { title: { text: axisTitle(found.title, found.unit) }, rangemode: "tozero" },
        yaxis: { title: { text: axisTitle("lost on earlier tasks", m.difference) }, zeroline: true, zerolinewidth: 1.5, zerolinecolor: css("--faint") },
      },
      note: found.note,
    };
  }

  // What a method costs.
  const COSTS = [
    ["seconds", "Training time", "s", 1, 1], ["peak_memory", "Peak memory while training", "MB", 1e-6, 0],
    ["stored_bytes", "Kept between tasks", "MB", 1e-6, 3], ["extra_share", "Extra passes over examples", "% of training", 100, 1],
  ];
  const costOf = (run, key) => {
    if (key !== "extra_share") return run.metrics[key];
    const { extra_examples: extra, trained_examples: trained } = run.metrics;
    return extra === null || extra === undefined || !trained ? null : extra / trained;
  };
  const hasCost = (key) => page.now.runs.some((run) => run.finished && costOf(run, key) !== null && costOf(run, key) !== undefined);
  function drawCost([key, title, unit, scale, digits]) {
    const measure = { scale, digits, unit };
    const groups = shownGroups().filter((n) => interval(finishedOf(n).map((run) => costOf(run, key)))).reverse();
    const data = groups.map((n, row) => {
      const runs = finishedOf(n);
      const value = interval(runs.map((run) => costOf(run, key)));
      const method = page.now.groups[n].method;
      return {
        type: "bar", orientation: "h", x: [value.mean * scale], y: [row], name: page.now.methods[method].title, meta: { method, points: 1 }, width: 0.66,
        marker: { color: faded(colour(method), 0.82), line: { color: colour(method), width: 1 } },
        error_x: { type: "data", array: [(value.half || 0) * scale], color: css("--ink"), thickness: 1, width: 3 },
        hovertemplate: `${hover(n, [`${title}: ${intervalText(value, measure)}`, ...runs.map((run) => `seed ${run.seed}: ${number(costOf(run, key), measure)}`)])}<extra></extra>`,
      };
    });
    const most = Math.max(...data.map((t) => t.x[0] + t.error_x.array[0]), 0);
    return {
      data,
      layout: {
        height: Math.max(180, groups.length * 27 + 70), margin: { l: 40, r: 12, t: 8, b: 42 },
        xaxis: { title: { text: unit }, range: [0, most ? most * 1.04 : 1], nticks: 5 },
        yaxis: { tickvals: groups.map((_, row) => row), ticktext: groups.map((n) => `${wrap(page.isolated ? page.now.groups[n].label.replace(/^\S+ ?/, "") || page.now.groups[n].title : page.now.methods[page.now.groups[n].method].title, 18)}  <b>${number(mean(finishedOf(n).map((run) => costOf(run, key))), measure)}</b>`), range: [-0.7, groups.length - 0.3], ticks: "", tickfont: { size: 11.5 }, showgrid: false, zeroline: false },
      },
    };
  }
  const COST_NOTES = {
    seconds: "Sum over the tasks; what runs share is counted in full.",
    peak_memory: "Of the process on a CPU, of PyTorch on a GPU.",
    stored_bytes: "What the method must keep from past tasks: data for rehearsal, one checkpoint for SFA.",
    extra_share: "Forward and backward passes beyond ordinary training, as Fisher values need.",
  };

  stockpot.addFigures = () => {
    if (page.now.runs.some((run) => run.finished)) {
      const held = stockpot.figure("average", "What is kept on average", drawBars);
      held.controls.append(stockpot.check("all settings", bars.all, (on) => { bars.all = on; held.plot.refresh(); }));
    }
  };
  stockpot.addMatrices = () => { stockpot.matrices = matrices(); };
  stockpot.addDistances = () => {
    for (const kind of ["l2", "kl"]) {
      if (page.now.movement[kind].points.length) {
        stockpot.figure(`distance-${kind}`, kind === "l2" ? "Forgetting against how far the weights moved" : "Forgetting against how far the answers moved", () => drawDistance(kind), { kind: "half" });
      }
    }
  };
  stockpot.addCosts = () => {
    const shown = COSTS.filter(([key]) => hasCost(key));
    for (const cost of shown) stockpot.figure(`cost-${cost[0].replace(/_/g, "-")}`, cost[1], () => drawCost(cost), { kind: shown.length === 4 ? "quarter" : "half", caption: COST_NOTES[cost[0]] });
  };
})();
