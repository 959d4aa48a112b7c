// The table of all examples (search, filter, sort, pages) and the two charts. Reads the JSON in #data.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const { rows: count, columns } = data.table;
  const TITLES = {
    rank: "rank", sample: "example", influence: "influence", exact: "exact", drawn: "visits", by: "by",
  };

  // ---------------------------------------------------------------- columns

  const signed = (value) => {
    if (value === null) return "unknown";
    const [digits, power] = value.toExponential(2).split("e");
    const size = String(Math.abs(Number(power))).padStart(2, "0");
    return (value < 0 ? digits : "+" + digits) + "e" + power[0] + size;
  };
  for (const column of columns) {
    column.isText = column.kind === "text";
    column.keys = column.isText ? column.codes : column.values;
    column.text = column.isText
      ? (row) => (column.codes[row] < 0 ? "" : column.levels[column.codes[row]])
      : (row) => (column.values[row] === null ? "" : String(column.values[row]));
    if (column.isText) column.lower = column.levels.map((level) => level.toLowerCase());
  }
  const builtIn = Object.fromEntries(columns.filter((c) => !c.own).map((c) => [c.name, c]));
  const own = columns.filter((c) => c.own);
  const shown = [...Object.keys(TITLES).map((name) => builtIn[name]), ...own];
  const doubtful = (row) => builtIn.trust.text(row) === "?";

  const cell = (column, row) => {
    if (column === builtIn.influence) return signed(column.values[row]);
    if (column === builtIn.exact) {
      return column.values[row] === null ? (doubtful(row) ? "?" : "") : signed(column.values[row]);
    }
    return column.text(row);
  };

  // ---------------------------------------------------------------- what is shown

  const state = { sort: builtIn.rank, descending: false, page: 0, size: 50 };
  let order = Uint32Array.from({ length: count }, (_, row) => row);

  // A test of the rows for each control that asks for something.
  const tests = [];
  const SHOWN = {
    harmful: (row) => builtIn.influence.values[row] < 0,
    helpful: (row) => builtIn.influence.values[row] > 0,
    exact: (row) => builtIn.exact.values[row] !== null,
    doubtful,
  };
  tests.push(() => SHOWN[byId("show").value]);
  tests.push(() => {
    const wanted = byId("search").value.trim().toLowerCase();
    if (!wanted) return undefined;
    const number = /^\d+$/.test(wanted) ? Number(wanted) : null;
    const inColumn = own.map((column) => contains(column, wanted));
    return (row) => builtIn.sample.values[row] === number || inColumn.some((test) => test(row));
  });

  function contains(column, wanted) {
    if (!column.isText) return (row) => column.text(row).includes(wanted);
    const found = column.lower.map((level) => level.includes(wanted));
    return (row) => column.codes[row] >= 0 && found[column.codes[row]];
  }

  function labelled(text, control) {
    const label = document.createElement("label");
    label.append(text + " ", control);
    byId("filters").append(label);
    return control;
  }

  function element(name, properties) {
    return Object.assign(document.createElement(name), properties);
  }

  function addFilter(column) {
    if (column.groups) {
      const select = labelled(column.name, element("select"));
      const options = column.isText ? column.levels.map((_, code) => code) : [...new Set(column.values)];
      const known = options.filter((key) => key !== null).sort((a, b) => a - b);
      select.append(new Option("any", ""));
      for (const key of known) select.append(new Option(column.isText ? column.levels[key] : key, key));
      const nothing = column.isText ? -1 : null;
      if (column.keys.includes(nothing)) select.append(new Option("(none)", "none"));
      tests.push(() => {
        if (select.value === "") return undefined;
        const key = select.value === "none" ? nothing : Number(select.value);
        return (row) => column.keys[row] === key;
      });
    } else if (column.isText) {
      const input = labelled(column.name, element("input", { type: "search", placeholder: "contains" }));
      tests.push(() => (input.value ? contains(column, input.value.toLowerCase()) : undefined));
    } else {
      const low = labelled(column.name + " from", element("input", { type: "number", step: "any" }));
      const high = labelled("to", element("input", { type: "number", step: "any" }));
      high.setAttribute("aria-label", column.name + " to");
      tests.push(() => {
        if (low.value === "" && high.value === "") return undefined;
        const from = low.value === "" ? -Infinity : Number(low.value);
        const to = high.value === "" ? Infinity : Number(high.value);
        const values = column.values;
        return (row) => values[row] !== null && values[row] >= from && values[row] <= to;
      });
    }
  }

  function select() {
    const asked = tests.map((test) => test()).filter((test) => test !== undefined);
    const kept = [];
    for (let row = 0; row < count; row += 1) {
      if (asked.every((test) => test(row))) kept.push(row);
    }
    order = Uint32Array.from(kept);
    sort();
  }

  function sort() {
    const { keys, isText } = state.sort;
    const way = state.descending ? -1 : 1;
    const unknown = (row) => keys[row] === null || (isText && keys[row] < 0);
    order.sort((a, b) => {
      if (unknown(a) || unknown(b)) return unknown(a) - unknown(b) || a - b; // always last
      return way * (keys[a] - keys[b] || a - b);
    });
    state.page = 0;
    draw();
  }

  // ---------------------------------------------------------------- drawing

  function head() {
    const line = document.createElement("tr");
    for (const column of shown) {
      const th = element("th", { scope: "col", className: column.isText ? "" : "n" });
      const button = element("button", { type: "button", textContent: TITLES[column.name] ?? column.name });
      if (column.own) button.textContent = column.name;
      button.addEventListener("click", () => {
        state.descending = state.sort === column && !state.descending;
        state.sort = column;
        sort();
      });
      column.head = th;
      th.append(button);
      line.append(th);
    }
    byId("rows").tHead.replaceChildren(line);
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(order.length / state.size));
    state.page = Math.min(Math.max(0, state.page), pages - 1);
    const first = state.page * state.size;
    const visible = order.subarray(first, first + state.size);
    byId("rows").tBodies[0].replaceChildren(...Array.from(visible, line));
    for (const column of shown) {
      if (column !== state.sort) column.head.removeAttribute("aria-sort");
      else column.head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    }
    const range = order.length ? `${first + 1} to ${first + visible.length} of ` : "";
    const all = order.length === count ? "" : `, out of ${count}`;
    byId("status").textContent = `Examples ${range}${order.length}${all}`;
    byId("page").value = state.page + 1;
    byId("page").max = pages;
    byId("of").textContent = `of ${pages}`;
    for (const button of byId("pages").querySelectorAll("button")) {
      const back = ["first", "previous"].includes(button.dataset.page);
      button.disabled = back ? state.page === 0 : state.page === pages - 1;
    }
  }

  function line(row) {
    const tr = document.createElement("tr");
    for (const column of shown) {
      const td = element("td", { className: column.isText ? "" : "n" });
      const text = cell(column, row);
      if (column === builtIn.sample && byId(`example-${text}`)) {
        td.append(element("a", { href: `#example-${text}`, textContent: text }));
      } else {
        td.textContent = text;
      }
      if (column === builtIn.influence && column.values[row]) {
        td.classList.add(column.values[row] < 0 ? "harmful" : "helpful");
      }
      tr.append(td);
    }
    return tr;
  }

  const MOVES = { first: () => 0, previous: () => state.page - 1, next: () => state.page + 1, last: () => Infinity };

  function listen() {
    let waiting;
    const form = byId("controls");
    form.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(select, 120);
    });
    form.addEventListener("reset", () => setTimeout(select));
    form.addEventListener("submit", (event) => event.preventDefault());
    byId("pages").addEventListener("click", (event) => {
      const move = MOVES[event.target.dataset.page];
      if (!move) return;
      state.page = move();
      draw();
    });
    byId("page").addEventListener("change", (event) => {
      state.page = Number(event.target.value) - 1 || 0;
      draw();
    });
    byId("size").addEventListener("change", (event) => {
      state.size = Number(event.target.value);
      state.page = 0;
      draw();
    });
  }

  // ---------------------------------------------------------------- charts

  const charts = [];

  function drawCharts() {
    charts.splice(0).forEach((chart) => chart.destroy());
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    Chart.defaults.color = colour("soft");
    Chart.defaults.borderColor = colour("line");
    Chart.defaults.animation = false;
    Chart.defaults.maintainAspectRatio = false;
    Chart.defaults.plugins.legend.display = false;
    const axis = (text, more) => ({ title: { display: true, text }, ...more });
    const ticks = { callback: (value) => Number(value.toPrecision(3)) };
    if (data.histogram) charts.push(histogram(colour, axis));
    if (data.scatter) charts.push(scatter(colour, axis, ticks));
  }

  function histogram(colour, axis) {
    const { edges, counts } = data.histogram;
    const labels = counts.map((_, bar) => signed((edges[bar] + edges[bar + 1]) / 2));
    const colours = counts.map((_, bar) => colour(edges[bar] < 0 ? "harmful" : "helpful"));
    const title = ([item]) => `${signed(edges[item.dataIndex])} to ${signed(edges[item.dataIndex + 1])}`;
    return new Chart(byId("histogram"), {
      type: "bar",
      data: { labels, datasets: [{ data: counts.map((n) => n || null), backgroundColor: colours, categoryPercentage: 1, barPercentage: 0.94 }] },
      options: {
        scales: {
          x: axis(`influence on ${data.query}`, { grid: { display: false } }),
          y: axis("examples", { type: "logarithmic", min: 0.5, ticks: { callback: (n) => (/^10*$/.test(String(n)) ? n : null) } }),
        },
        plugins: { tooltip: { callbacks: { title, label: (item) => `${item.raw} examples` } } },
      },
    });
  }

  function scatter(colour, axis, ticks) {
    const points = data.scatter.points.map(([x, y, index]) => ({ x, y, index }));
    const all = points.flatMap(({ x, y }) => [x, y]);
    const ends = [Math.min(0, ...all), Math.max(0, ...all)];
    const label = ({ raw }) => `example ${raw.index}: estimate ${signed(raw.x)}, exact ${signed(raw.y)}`;
    return new Chart(byId("scatter"), {
      type: "scatter",
      data: {
        datasets: [
          { data: points, backgroundColor: points.map(({ y }) => colour(y < 0 ? "harmful" : "helpful")), radius: 4, hoverRadius: 6 },
          { type: "line", data: ends.map((end) => ({ x: end, y: end })), borderColor: colour("soft"), borderWidth: 1, borderDash: [5, 4], radius: 0, hitRadius: 0 },
        ],
      },
      options: {
        scales: { x: axis("estimate", { ticks }), y: axis("exact replay", { ticks }) },
        plugins: { tooltip: { filter: ({ datasetIndex }) => datasetIndex === 0, callbacks: { label } } },
      },
    });
  }

  own.forEach(addFilter);
  head();
  listen();
  draw();
  drawCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
})();
