"use strict";
// Over the stream: every task's curve with merge marks (Fig. 2), one task under every method
// (Fig. 12), training loss (Fig. 11), and the loss along the line from the anchor.
(() => {
  const { page, esc, clip, mean, interval, intervalText, axisTitle, css, colour, faded, taskColour, runsOf, orderOf, inOneOrder, best, shownGroups, hover } = stockpot;
  const has = (method) => page.now.methods[method] !== undefined;
  const begun = (n) => runsOf(n).some((run) => run.stages.some((stage) => stage.losses));
  const offsets = (run) => run.stages.reduce((all, stage) => [...all, all[all.length - 1] + stage.steps], [0]);

  // A run's scores on all tasks (its own columns) by global step: [step, moment, row, stage]. Where a
  // task ends the next begins, with other weights for methods that train from the starting model.
  const ORDER = { b: 0, a: 1, s: 2, e: 3 };
  const inOrder = (p, q) => p[0] - q[0] || p[3] - q[3] || ORDER[p[1]] - ORDER[q[1]];
  function path(run) {
    const from = offsets(run);
    const found = run.b ? [[0, "s", run.b, 0]] : [];
    for (const [stage, step, moment, row] of run.during) {
      if (from[stage] !== undefined && !(run.b && stage === 0 && step === 0)) found.push([from[stage] + step, moment, row, stage]);
    }
    run.stages.forEach((stage, n) => {
      const row = run.R[stage.row];
      if (row && stage.losses) found.push([from[n + 1], "e", row, n]);
    });
    return found.sort(inOrder);
  }
  // The mean over a group's runs of one task order: [step, moment, [interval a task]].
  const cache = new Map();
  function meanPath(group) {
    const key = `${page.experiments.indexOf(page.now)} ${group}`;
    if (!cache.has(key)) {
      const runs = inOneOrder(group).filter((run) => run.stages.some((stage) => stage.losses));
      const points = new Map();
      for (const run of runs) {
        for (const [step, moment, row, stage] of path(run)) {
          const at = `${step} ${moment} ${stage}`;
          if (!points.has(at)) points.set(at, [step, moment, [], stage]);
          points.get(at)[2].push(row);
        }
      }
      const rows = [...points.values()].sort(inOrder);
      cache.set(key, rows.map(([step, moment, values]) => [step, moment, page.now.tasks.map((_, i) => {
        const column = page.now.orders[orderOf(group)].indexOf(i);
        const cells = values.map((row) => row[column]).filter((v) => v !== null);
        return cells.length ? interval(cells) : null;
      })]));
    }
    return cache.get(key);
  }
  stockpot.forgetPaths = () => cache.clear();
  const MOMENTS = { s: "while training", b: "just before averaging", a: "just after averaging", e: "after the task" };
  const SHAPE = { width: 1.8 };

  // Where one task ends and the next begins, for the stages of a run.
  function borders(run, shapes, annotations, height) {
    const from = offsets(run);
    const most = window.innerWidth < 620 ? 4 : 12;
    run.stages.forEach((stage, n) => {
      if (n) shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: from[n], x1: from[n], line: { dash: "dot", width: 1, color: css("--faint") }, layer: "below" });
      if (run.stages.length <= most && stage.tasks.length === 1) annotations.push({ x: (from[n] + from[n + 1]) / 2, y: 1, yref: "paper", yanchor: "bottom", showarrow: false, text: esc(clip(page.now.tasks[page.now.orders[run.order][stage.tasks[0]]], 16)), font: { size: 12, color: css("--faint") } });
    });
    return height;
  }

  // A run of several groups whose borders between tasks are shown; joint training has none.
  const longest = (groups) => groups.flatMap(inOneOrder).filter((r) => r.stages.length > 1).sort((p, q) => p.order - q.order)[0];

  // Fig. 2.
  const picked = { a: null, b: null };
  function drawCurves(which) {
    const m = page.now.measure;
    const group = picked[which];
    const rows = meanPath(group);
    const tasks = page.now.tasks;
    const shapes = [];
    const annotations = [];
    const run = inOneOrder(group).find((r) => r.stages.length) || runsOf(group)[0];
    borders(run, shapes, annotations);
    const data = tasks.map((task, i) => {
      const own = rows.filter((row) => row[2][i]);
      return {
        type: "scatter", mode: own.length > 30 ? "lines" : "lines+markers", x: own.map((r) => r[0]), y: own.map((r) => r[2][i].mean * m.scale), name: esc(clip(task, 24)), meta: { points: own.length, task: i },
        line: { ...SHAPE, color: taskColour(i, tasks.length) }, marker: { size: 5 },
        hovertemplate: own.map((r) => `<b>${esc(task)}</b><br>step ${r[0].toLocaleString("en")}, ${MOMENTS[r[1]]}<br>${intervalText(r[2][i], m)}<br>mean of ${r[2][i].n} run${r[2][i].n > 1 ? "s" : ""}<extra></extra>`),
      };
    });
    const from = offsets(run);
    const merges = run.merges.map(([stage, step, beta, before, after]) => ({ x: from[stage] + step, text: `<b>average</b> at step ${(from[stage] + step).toLocaleString("en")}<br>beta ${beta}<br>L2 to anchor ${before.toPrecision(3)} → ${after.toPrecision(3)}<br>seed ${run.seed}<extra></extra>` }));
    if (merges.length) {
      const shade = colour(page.now.groups[group].method);
      if (merges.length <= 200) for (const merge of merges) shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: merge.x, x1: merge.x, line: { width: 1, color: faded(shade, 0.35) }, layer: "below" });
      data.push({ type: "scatter", mode: "markers", x: merges.map((p) => p.x), y: merges.map(() => 0.02), yaxis: "y2", name: "average", meta: { points: merges.length, merges: true }, marker: { symbol: "triangle-up", size: 9, color: shade }, hovertemplate: merges.map((p) => p.text) });
    }
    const lower = m.better === "lower";
    return {
      data,
      layout: {
        height: tasks.length > 8 ? 440 : 390, shapes, annotations, showlegend: tasks.length <= 40, margin: { l: 55, r: 12, t: 26, b: 45 },
        legend: { orientation: "h", y: -0.2, itemclick: "toggleothers", itemdoubleclick: "toggle", font: { size: 11.5 } },
        xaxis: { title: { text: "optimizer step of the whole stream" }, zeroline: false },
        yaxis: { title: { text: axisTitle(m.name, m.unit) }, ...(m.unit === "%" ? { range: [-2, 102] } : {}), zeroline: false },
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      },
      note: `${lower ? "Lower is better. " : ""}${page.now.groups[group].title}, mean over its runs${page.now.orders.length > 1 ? ` of ${orderOf(group) ? `task order ${orderOf(group) + 1}` : "the first task order"}` : ""}.${merges.length ? " Triangles and faint lines: merge events (averages with the anchor)." : ""}`,
    };
  }
  function curveGroups() {
    return page.now.groups.map((_, n) => n).filter(begun);
  }
  stockpot.addCurves = () => {
    const groups = curveGroups();
    if (!groups.length) return;
    const picks = best();
    const of = (method) => (picks[method] !== undefined ? picks[method] : groups.find((n) => page.now.groups[n].method === method));
    picked.a = of("sequential") !== undefined ? of("sequential") : groups[0];
    picked.b = of("sfa") !== undefined ? of("sfa") : groups.find((n) => n !== picked.a) || groups[0];
    const during = page.now.runs.some((run) => run.during.length);
    for (const which of picked.a === picked.b ? ["a"] : ["a", "b"]) {
      const held = stockpot.figure(`curves-${which}`, which === "a" ? "Every task over the stream" : "The same under another method", () => drawCurves(which), {
        kind: picked.a === picked.b ? "" : "half",
        caption: during ? "" : "Scores after each task; evaluation.every in the experiment's file takes them during training too.",
      });
      held.controls.append(stockpot.select("method", groups.map((n) => [String(n), page.now.groups[n].title]), String(picked[which]), (value) => {
        picked[which] = Number(value);
        held.plot.refresh();
      }));
    }
  };

  // Fig. 12.
  const one = { task: 0 };
  function drawOneTask() {
    const m = page.now.measure;
    const data = [];
    const shapes = [];
    const annotations = [];
    const groups = shownGroups().concat(page.isolated ? [] : page.now.groups.map((_, n) => n).filter((n) => page.now.groups[n]["left out"] && stockpot.finishedOf(n).length));
    for (const group of groups) {
      const method = page.now.groups[group].method;
      const own = meanPath(group).filter((row) => row[2][one.task]);
      if (!own.length) continue;
      data.push({
        type: "scatter", mode: own.length > 30 ? "lines" : "lines+markers", x: own.map((r) => r[0]), y: own.map((r) => r[2][one.task].mean * m.scale), name: esc(page.now.groups[group].title), meta: { method, points: own.length },
        line: { ...SHAPE, color: colour(method), dash: page.now.groups[group]["left out"] ? "dash" : own.length < 3 ? "dot" : "solid" }, marker: { size: 7, symbol: stockpot.symbol(method) },
        hovertemplate: own.map((r) => `${hover(group, [`step ${r[0].toLocaleString("en")}, ${MOMENTS[r[1]]}`, intervalText(r[2][one.task], m), `mean of ${r[2][one.task].n} runs`])}<extra></extra>`),
      });
    }
    const run = longest(groups);
    if (run) borders(run, shapes, annotations);
    return {
      data,
      layout: { height: 420, shapes, annotations, margin: { l: 55, r: 12, t: 26, b: 45 }, xaxis: { title: { text: "optimizer step of the whole stream" }, zeroline: false }, yaxis: { title: { text: axisTitle(`${m.name} on ${clip(page.now.tasks[one.task], 40)}`, m.unit) }, zeroline: false } },
      note: `Each method at the setting with its best average; press a method above for all of its settings.${has("multitask") ? " Multitask has steps of its own: all tasks at once." : ""}${["task-arithmetic", "ties", "fisher-merging"].some(has) ? " Task arithmetic, TIES and Fisher merging train every task from the starting model and merge when it ends." : ""}`,
    };
  }
  stockpot.addOneTask = () => {
    if (!page.now.runs.some((run) => run.finished)) return;
    one.task = 0;
    const held = stockpot.figure("one-task", "One task under every method", drawOneTask, { kind: "half" });
    held.controls.append(stockpot.select("task", page.now.tasks.map((t, n) => [String(n), t]), "0", (value) => { one.task = Number(value); held.plot.refresh(); }));
  };

  // Fig. 11.
  function drawLoss() {
    const data = [];
    const shapes = [];
    const annotations = [];
    for (const group of shownGroups()) {
      const method = page.now.groups[group].method;
      const points = new Map();
      for (const run of inOneOrder(group)) {
        const from = offsets(run);
        run.stages.forEach((stage, n) => (stage.losses || []).forEach(([step, loss]) => {
          const at = from[n] + step;
          if (loss !== null) points.set(at, [...(points.get(at) || []), loss]);
        }));
      }
      const steps = [...points.keys()].sort((p, q) => p - q);
      if (!steps.length) continue;
      data.push({
        type: "scatter", mode: "lines", x: steps, y: steps.map((step) => mean(points.get(step))), name: esc(page.now.groups[group].title), meta: { method, points: steps.length }, line: { width: 1.4, color: colour(method) },
        hovertemplate: `${hover(group, [])}<br>step %{x:,}: %{y:.4f}<extra></extra>`,
      });
    }
    const run = longest(shownGroups());
    if (run) borders(run, shapes, annotations);
    return {
      data,
      layout: { height: 420, shapes, annotations, margin: { l: 55, r: 12, t: 26, b: 45 }, xaxis: { title: { text: "optimizer step of the whole stream" }, zeroline: false }, yaxis: { title: { text: "training loss (nats)" }, rangemode: "tozero" } },
      note: "Mean over windows of a fiftieth of a task and over runs, penalties included (L1, L2, EWC).",
    };
  }
  stockpot.addLoss = () => {
    if (page.now.runs.some((run) => run.stages.some((stage) => (stage.losses || []).length))) stockpot.figure("training-loss", "Training loss over the stream", drawLoss, { kind: "half" });
  };

  // The loss along the line from the anchor to the final model.
  const line = { stage: null, task: 0, metric: "loss" };
  const lineRuns = () => page.now.runs.filter((run) => run.line.length);
  function drawLine() {
    const data = [];
    const share = line.metric === "accuracy";
    for (const group of shownGroups()) {
      const method = page.now.groups[group].method;
      const own = inOneOrder(group).map((run) => run.line.find(([stage, task, metric]) => stage === line.stage && task === stockpot.columnOf(run, line.task) && metric === line.metric)).filter(Boolean);
      if (!own.length) continue;
      const alphas = [...new Set(own.flatMap((l) => l[3].map(([alpha]) => alpha)))].sort((p, q) => p - q);
      const at = own.map((l) => new Map(l[3])); // a point may be missing in one of the runs
      const points = alphas.map((alpha) => [alpha, interval(at.map((l) => l.get(alpha)))]).filter((p) => p[1]);
      const m = { scale: share ? 100 : 1, digits: share ? 1 : 3, unit: share ? "%" : "nats" };
      data.push({
        type: "scatter", mode: "lines+markers", x: points.map((p) => p[0]), y: points.map((p) => p[1].mean * m.scale), name: esc(page.now.groups[group].title), meta: { method, points: points.length }, line: { ...SHAPE, color: colour(method) }, marker: { size: 7, symbol: stockpot.symbol(method) },
        hovertemplate: points.map((p) => `${hover(group, [`${Math.round(p[0] * 100)} % of the way`, intervalText(p[1], m)])}<extra></extra>`),
      });
    }
    return {
      data,
      layout: { height: 400, xaxis: { title: { text: "from the anchor (0) to the model after the task (1)" }, zeroline: false }, yaxis: { title: { text: share ? `accuracy on ${clip(page.now.tasks[line.task], 36)} (%)` : `held-out loss on ${clip(page.now.tasks[line.task], 36)} (nats)` }, zeroline: false } },
      note: "Weights between the anchor and the model, (1 − α) θₒ + α θ. A hill between the ends is a barrier: averages there are worse than both. Where there is none, the line shows what an average of the two gives up and what it keeps.",
    };
  }
  stockpot.addLine = () => {
    const runs = lineRuns();
    if (!runs.length) return;
    const stages = [...new Set(runs.flatMap((run) => run.line.map((l) => l[0])))].sort((p, q) => p - q);
    const metrics = [...new Set(runs.flatMap((run) => run.line.map((l) => l[2])))];
    Object.assign(line, { stage: stages[stages.length - 1], task: 0, metric: metrics.includes("loss") ? "loss" : metrics[0] });
    const held = stockpot.figure("line", "Loss along the line from the anchor", drawLine);
    held.controls.append(
      stockpot.select("task scored", page.now.tasks.map((t, n) => [String(n), t]), "0", (value) => { line.task = Number(value); held.plot.refresh(); }),
      stockpot.select("after", stages.map((n) => [String(n), page.now.tasks[n] || `stage ${n + 1}`]), String(line.stage), (value) => { line.stage = Number(value); held.plot.refresh(); }),
    );
    if (metrics.length > 1) held.controls.append(stockpot.select("as", metrics.map((v) => [v, v]), line.metric, (value) => { line.metric = value; held.plot.refresh(); }));
  };
})();
