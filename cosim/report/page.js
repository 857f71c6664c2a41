"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const tasks = JSON.parse(document.getElementById("tasks").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)").matches;
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(figure) {
    const layout = figure.layout;
    layout.font.color = color("--ink");
    layout.hoverlabel.bgcolor = color("--ink");
    layout.hoverlabel.bordercolor = color("--ink");
    layout.hoverlabel.font.color = color("--surface");
    for (const axis of [layout.xaxis, layout.yaxis]) {
      axis.gridcolor = color("--grid");
      axis.tickfont = { color: color("--muted"), size: 12 };
      axis.title = { ...(axis.title || {}), font: { color: color("--muted"), size: 12 } };
    }
    layout.modebar = { orientation: "v", bgcolor: "rgba(0,0,0,0)", color: color("--muted"), activecolor: color("--ink") };
    layout.xaxis.spikecolor = color("--muted");
    layout.xaxis.spikethickness = 1;
    if (coarse) layout.dragmode = false; // a finger scrolls the page
    if (window.innerWidth < 600 && layout.showlegend !== false) layout.height += 24 * Math.ceil(figure.data.length / 2);
    for (const trace of figure.data) {
      if (trace.meta && trace.meta.outline) {
        trace.marker.line = { width: trace.type === "bar" ? 1.5 : 1, color: color("--surface") };
      }
    }
    return figure;
  }

  const buttons = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"], ["toImage"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons: buttons };
  function draw() {
    for (const [name, figure] of Object.entries(structuredClone(figures))) {
      const place = document.getElementById("figure-" + name);
      const bar = name === "breakdown" || coarse ? { displayModeBar: false } : {};
      const { data, layout } = themed(figure);
      Plotly.react(place, data, layout, { ...config, ...bar });
    }
    numberBoxes();
  }

  // Micro-batch numbers in those boxes of the pipeline that have room for them.
  const NUMBERS = 1500;
  function numberBoxes() {
    const place = document.getElementById("figure-pipeline");
    if (!place) return;
    const { lanes, texts, ink } = tasks.pipeline;
    const axis = place._fullLayout.xaxis;
    const [from, until] = axis.range;
    const pixels = axis._length / (until - from);
    const found = { x: [], y: [], text: [], color: [] };
    lanes.forEach((lane, row) => {
      lane.start.forEach((start, i) => {
        const end = lane.end[i];
        if (end < from || start > until || !ink[lane.key[i]] || lane.tasks[i] > 1 || found.x.length >= NUMBERS) return;
        const number = texts[lane.text[i]].match(/\d+$/)?.[0] ?? "";
        if ((Math.min(end, until) - Math.max(start, from)) * pixels < 7 * number.length + 2) return;
        found.x.push((Math.min(end, until) + Math.max(start, from)) / 2);
        found.y.push(row);
        found.text.push(number);
        found.color.push(ink[lane.key[i]]);
      });
    });
    const { x, y, text } = found;
    Plotly.restyle(place, { x: [x], y: [y], text: [text], "textfont.color": [found.color] }, [place.data.length - 1]);
  }
  draw();
  const pipeline = document.getElementById("figure-pipeline");
  if (pipeline) {
    pipeline.on("plotly_relayout", numberBoxes);
    window.addEventListener("resize", () => setTimeout(numberBoxes, 200));
  }
  dark.addEventListener("change", draw);

  // Memory against the device's capacity, or its peak filling the figure.
  const scale = document.getElementById("memory-scale");
  if (scale) {
    scale.addEventListener("click", () => {
      const toPeak = scale.getAttribute("aria-pressed") !== "true";
      scale.setAttribute("aria-pressed", String(toPeak));
      const range = toPeak ? [0, Number(scale.dataset.peak) * 1.25] : figures.memory.layout.yaxis.range;
      Plotly.relayout("figure-memory", { "yaxis.range": range });
    });
  }

  // What lies under the pointer in the timeline and the pipeline.
  const tip = document.getElementById("tip");
  const duration = (s) => {
    for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]) {
      if (s >= scale) return Number((s / scale).toPrecision(4)) + " " + unit;
    }
    return Number((s * 1e9).toPrecision(4)) + " ns";
  };
  function taskAt(event, place, lanes) {
    const full = place._fullLayout;
    const box = place.getBoundingClientRect();
    const px = event.clientX - box.left - full.xaxis._offset;
    const py = event.clientY - box.top - full.yaxis._offset;
    if (px < 0 || px > full.xaxis._length || py < 0 || py > full.yaxis._length) return null;
    const y = full.yaxis.p2d(py);
    const lane = lanes[Math.round(y)];
    if (!lane || Math.abs(y - Math.round(y)) > 0.42) return null;
    const time = full.xaxis.p2d(px);
    const slack = Math.abs(full.xaxis.p2d(px + 2) - time);
    let low = 0;
    let high = lane.start.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (lane.start[middle] <= time) low = middle + 1;
      else high = middle;
    }
    for (const i of [low - 1, low]) {
      if (i >= 0 && i < lane.start.length && lane.start[i] - slack <= time && time <= lane.end[i] + slack) return [lane, i];
    }
    return null;
  }
  function showTip(event, place, shown) {
    const found = taskAt(event, place, shown.lanes);
    tip.hidden = !found;
    if (!found) return;
    const [lane, i] = found;
    const words = shown.texts[lane.text[i]];
    tip.replaceChildren();
    const title = document.createElement("b");
    const launch = shown.keys[lane.key[i]] === "launch" ? "launching " : "";
    title.textContent = launch + words + (lane.tasks[i] > 1 ? ` and ${lane.tasks[i] - 1} more` : "");
    tip.append(title, `${duration(lane.end[i] - lane.start[i])}, from ${duration(lane.start[i])} on`);
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    const below = event.clientY + 16 + tip.offsetHeight < window.innerHeight;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (below ? event.clientY + 16 : event.clientY - tip.offsetHeight - 12) + "px";
  }
  for (const [name, shown] of Object.entries(tasks)) {
    const place = document.getElementById("figure-" + name);
    place.addEventListener("pointermove", (event) => showTip(event, place, shown));
    place.addEventListener("pointerdown", (event) => showTip(event, place, shown));
    place.addEventListener("pointerleave", () => { tip.hidden = true; });
    document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  }

  // The table of ops: sorted by a click on a heading, filtered by what is typed.
  const table = document.querySelector("table.ops");
  if (table) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.firstElementChild.addEventListener("click", () => {
        const numeric = heading.classList.contains("number");
        const current = heading.getAttribute("aria-sort");
        const descending = current ? current === "ascending" : numeric;
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
        const compare = numeric ? (a, b) => Number(value(a)) - Number(value(b)) : (a, b) => value(a).localeCompare(value(b), "en", { numeric: true });
        const rows = [...body.rows].sort((a, b) => (descending ? -1 : 1) * compare(a, b));
        body.replaceChildren(...rows);
      });
    });
    document.querySelector(".filter").addEventListener("input", (event) => {
      const wanted = event.target.value.toLowerCase().split(/\s+/);
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !wanted.every((word) => text.includes(word));
      }
    });
  }
})();
