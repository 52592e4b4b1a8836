// Theme, sorting, filters and charts. Without it every page still shows all of its numbers.
"use strict";

(() => {
  const root = document.documentElement;
  const STORED = "guardbench-theme";

  // A browser may refuse storage to a page from a file; the theme is then this page's alone.
  const remembered = () => {
    try { return localStorage.getItem(STORED); } catch { return null; }
  };
  const remember = (theme) => {
    try { localStorage.setItem(STORED, theme); } catch { /* not kept */ }
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const first = remembered();
  if (first === "dark" || first === "light") root.dataset.theme = first;

  const themeButton = () => {
    const button = document.getElementById("theme");
    const show = () => { button.textContent = isDark() ? "Light theme" : "Dark theme"; };
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      remember(root.dataset.theme);
      show();
      draw();
    });
    system.addEventListener("change", () => { show(); draw(); });
    show();
  };

  // Sorting: a button in each heading; what has no value stays last, equals keep the board's order.
  const valueOf = (row, column, numeric) => {
    const text = row.cells[column].dataset.value;
    return text === undefined ? null : numeric ? Number(text) : text;
  };

  const sortBy = (table, heading, direction) => {
    const column = heading.cellIndex;
    const numeric = heading.classList.contains("number");
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [valueOf(a, column, numeric), valueOf(b, column, numeric)];
      if (x === null || y === null) return (x === null) - (y === null) || a.dataset.place - b.dataset.place;
      const order = numeric ? x - y : x.localeCompare(y, "en");
      return sign * order || a.dataset.place - b.dataset.place;
    });
    table.tBodies[0].append(...rows);
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
  };

  const sortable = (table) => {
    [...table.tBodies[0].rows].forEach((row, place) => { row.dataset.place = place; });
    for (const heading of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...[...heading.childNodes].filter((node) => node.className !== "small"));
      heading.prepend(button);
      button.addEventListener("click", () => {
        const now = heading.getAttribute("aria-sort");
        const turned = now === "ascending" ? "descending" : "ascending";
        sortBy(table, heading, now ? turned : heading.dataset.first);
      });
    }
  };

  // Filters hide rows and whole tracks; no rank changes, for ranks are the board's.
  const visible = new Set();

  const filter = () => {
    const track = document.getElementById("filter-track").value;
    const origin = document.getElementById("filter-origin").value;
    const words = document.getElementById("filter-text").value.toLowerCase().split(/\s+/).filter(Boolean);
    let total = 0;
    visible.clear();
    for (const section of document.querySelectorAll("section.track")) {
      let shown = 0;
      for (const row of section.querySelectorAll("tbody tr")) {
        total += 1;
        row.hidden = Boolean(
          (track && section.dataset.track !== track)
          || (origin && row.dataset.origin !== origin)
          || !words.every((word) => row.dataset.text.includes(word)));
        if (!row.hidden) { shown += 1; visible.add(row.dataset.row); }
      }
      section.hidden = shown === 0;
    }
    document.getElementById("filter-count").textContent =
      `${visible.size} of ${total} row${total === 1 ? "" : "s"}`;
    draw();
  };

  const filters = () => {
    const group = document.querySelector(".filters");
    if (!group) return;
    group.hidden = false;
    for (const control of group.querySelectorAll("select, input")) control.addEventListener("input", filter);
    filter();
  };

  // Charts. A colour of the sheet is asked of the browser, which knows what it is in this theme.
  const colour = (name, alpha = 1) => {
    const probe = document.createElement("span");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const [red, green, blue] = getComputedStyle(probe).color.match(/[\d.]+/g);
    probe.remove();
    return `rgba(${red}, ${green}, ${blue}, ${alpha})`;
  };
  // plotly.js reads a little HTML in what it writes; names are text.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const percent = ([mean, low, high]) => `${mean.toFixed(1)}% (${low.toFixed(1)}–${high.toFixed(1)})`;
  const TRACKS = { hard: "circle", soft: "square", teacher: "diamond" };

  // Names beside points, but none that would cover another's: those are told on hover and in the table.
  const labels = (rows, place, ends) => {
    const taken = [];
    const share = (value, [low, high]) => (value - low) / (high - low);
    return rows.map((row) => {
      const [x, y] = [share(place(row), ends[0]), share(row.ranked[0], ends[1])];
      if (taken.some(([a, b]) => Math.abs(a - x) < 0.4 && Math.abs(b - y) < 0.06)) return "";
      taken.push([x, y]);
      return plain(row.label.length > 24 ? `${row.label.slice(0, 23)}…` : row.label);
    });
  };

  const layout = (x, y, more = {}) => {
    const axis = {
      gridcolor: colour("edge"), zeroline: false, linecolor: colour("muted"), automargin: true,
    };
    return {
      paper_bgcolor: "rgba(0, 0, 0, 0)",
      plot_bgcolor: "rgba(0, 0, 0, 0)",
      font: { color: colour("text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      margin: { l: 56, r: 16, t: 16, b: 56 },
      hovermode: "closest",
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("edge"), font: { color: colour("text") }, align: "left" },
      legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 },
      xaxis: { ...axis, ...x, title: { ...x.title, standoff: 10 } },
      yaxis: { ...axis, ...y, title: { ...y.title, standoff: 10 } },
      ...more,
    };
  };

  const spread = (spans) => ({
    type: "data", symmetric: false, thickness: 1, width: 3,
    array: spans.map(([mean, , high]) => high - mean),
    arrayminus: spans.map(([mean, low]) => mean - low),
  });

  const scatter = (rows, place, names, error) => Object.keys(TRACKS).flatMap((track) => {
    const some = rows.filter((row) => row.track === track);
    if (!some.length) return [];
    const bars = { color: colour(track, 0.55) };
    return [{
      type: "scatter",
      name: `${track} labels`,
      showlegend: true,
      mode: "markers+text",
      x: some.map(place),
      y: some.map((row) => row.ranked[0]),
      error_x: error ? { ...spread(some.map(error)), ...bars } : undefined,
      error_y: { ...spread(some.map((row) => row.ranked)), ...bars },
      cliponaxis: false,
      text: some.map((row) => names[rows.indexOf(row)]),
      textposition: "top right",
      textfont: { color: colour("text") },
      customdata: some.map((row) => row.url),
      hovertext: some.map((row) => `${plain(row.label)}<br>clean ${percent(row.clean)}<br>robust ${percent(row.ranked)}`
        + `<br>distilled in ${row.seconds} s on ${plain(row.device)}`),
      hoverinfo: "text",
      marker: { color: colour(track), symbol: TRACKS[track], size: 10 },
    }];
  });

  // Ends of an axis in percent: around what is drawn, in tens.
  const around = (spans) => [
    Math.max(0, 10 * Math.floor(Math.min(...spans.map((span) => span[1])) / 10 - 0.2)),
    Math.min(100, 10 * Math.ceil(Math.max(...spans.map((span) => span[2])) / 10 + 0.2)),
  ];

  const SHORTEST = 0.1;
  const seconds = (value) => {
    if (value < 60) return `${value} s`;
    return value < 3600 ? `${value / 60} min` : `${value / 3600} h`;
  };
  const TIMES = [0.1, 1, 10, 60, 600, 3600, 36000, 360000, 3600000];
  const FINER = [0.3, 3, 30, 180, 1800, 10800, 108000, 1080000];

  const scatters = (data, rows) => {
    const robust = { title: { text: `robust: ${plain(data.ranked_by)}, %` }, range: around(rows.map((row) => row.ranked)) };
    const clean = around(rows.map((row) => row.clean));
    const ends = [Math.max(clean[0], robust.range[0]), Math.min(clean[1], robust.range[1])];
    const equal = ends[0] < ends[1] ? [{
      type: "line", x0: ends[0], y0: ends[0], x1: ends[1], y1: ends[1], layer: "below",
      line: { color: colour("muted"), width: 1, dash: "dot" },
    }] : [];
    const place = (row) => row.clean[0];
    plot("chart-clean", scatter(rows, place, labels(rows, place, [clean, robust.range]), (row) => row.clean),
      layout({ title: { text: "clean, %" }, range: clean }, robust, { shapes: equal }));
    const time = (row) => Math.max(row.seconds, SHORTEST);
    const log = (row) => Math.log10(time(row));
    const range = [Math.min(...rows.map(log)) - 0.5, Math.max(...rows.map(log)) + 1];
    const times = range[1] - range[0] < 3 ? [...TIMES, ...FINER] : TIMES;
    plot("chart-cost", scatter(rows, time, labels(rows, log, [range, robust.range])),
      layout({
        title: { text: "time to distil" }, type: "log", tickvals: times, ticktext: times.map(seconds), range,
      }, robust));
  };

  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const HUES = ["hard", "soft", "teacher", "text"];

  // Linear up to the smallest radius, so that clean accuracy has a place; a step for each doubling beyond.
  const curves = (found) => {
    const smallest = Math.min(...found.flatMap((curve) => curve.points.map((point) => point[1]).filter(Boolean)));
    const place = (radius) => (radius <= smallest ? radius / smallest : 1 + Math.log2(radius / smallest));
    const ticks = new Map();
    for (const curve of found) for (const point of curve.points) ticks.set(place(point[1]), point[0]);
    const kept = [...ticks].sort((a, b) => a[0] - b[0])
      .filter(([at], number, all) => number === 0 || number === all.length - 1 || at - all[number - 1][0] > 0.39);
    const traces = found.flatMap((curve, number) => {
      const x = curve.points.map((point) => place(point[1]));
      const hue = HUES[number % HUES.length];
      const dash = DASHES[Math.floor(number / HUES.length) % DASHES.length];
      return [{
        type: "scatter", mode: "none", hoverinfo: "skip", showlegend: false, legendgroup: String(number),
        x: [...x, ...[...x].reverse()],
        y: [...curve.points.map((point) => point[4]), ...curve.points.map((point) => point[3]).reverse()],
        fill: "toself", fillcolor: colour(hue, 0.15),
      }, {
        type: "scatter", mode: "lines+markers", name: plain(curve.label), legendgroup: String(number), showlegend: true,
        x, y: curve.points.map((point) => point[2]),
        hovertext: curve.points.map((point) => `${plain(curve.label)}<br>radius ${point[0]}: ${percent(point.slice(2))}`),
        hoverinfo: "text",
        line: { color: colour(hue), dash }, marker: { color: colour(hue), size: 6 },
      }];
    });
    plot("chart-curves", traces, layout(
      { title: { text: plain(found[0].axis) }, tickvals: kept.map(([at]) => at), ticktext: kept.map(([, words]) => words) },
      { title: { text: "accuracy, %" }, range: [0, 102] }));
  };

  const plot = (id, traces, form) => {
    const chart = document.getElementById(id);
    const drawn = chart.classList.contains("drawn");
    Plotly.react(chart, traces, form, { displayModeBar: false, responsive: true });
    chart.classList.add("drawn");
    if (drawn) return;
    chart.on("plotly_click", (event) => {
      const url = event.points[0].customdata;
      if (url) location.href = url;
    });
  };

  const draw = () => {
    const source = document.getElementById("data");
    if (!source || typeof Plotly === "undefined") return;
    const data = JSON.parse(source.textContent);
    const shows = (item) => !document.querySelector(".filters") || visible.has(item.row);
    if (data.rows) {
      const rows = data.rows.filter(shows);
      for (const id of ["chart-clean", "chart-cost"]) document.getElementById(id).hidden = !rows.length;
      if (rows.length) scatters(data, rows);
    }
    const found = data.curves.filter(shows);
    const chart = document.getElementById("chart-curves");
    if (chart) chart.hidden = !found.length;
    if (found.length) curves(found);
  };

  document.addEventListener("DOMContentLoaded", () => {
    themeButton();
    document.querySelectorAll("table.board").forEach(sortable);
    filters();
    draw();
  });
})();
