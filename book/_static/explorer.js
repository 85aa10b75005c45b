/* The index explorer: which input pixels and taps meet in an output pixel, and the way back.

   Draws itself into <div id="explorer">. Needs no other file, and no server. The settings and the
   chosen pixel live in the address's hash, with the names that Problem has:
       #input_size=4,4&kernel_size=3,3&stride=2,2&...&output=3,4
   What is legal, and the words for what is not, follow convt_lab/problem.py. The sums do not: pairs
   are found here by trying every tap, in the package by residue classes, so that a test can compare
   the two. */
"use strict";

(() => {
  const AXES = ["rows", "columns"];

  // In the order of the controls; `most` is what this page can draw, not what is legal.
  const PARAMETERS = {
    input_size: { label: "input size", least: 1, most: 12, start: [4, 4] },
    kernel_size: { label: "kernel size", least: 1, most: 7, start: [3, 3] },
    stride: { label: "stride", least: 1, most: 5, start: [2, 2] },
    padding: { label: "padding", least: 0, most: 12, start: [1, 1] },
    output_padding: { label: "output padding", least: 0, most: 5, start: [1, 1] },
    dilation: { label: "dilation", least: 1, most: 5, start: [1, 1] },
  };
  const NAMES = Object.keys(PARAMETERS);
  const SIDES = ["input", "output"];
  const MINUS = "−";

  const state = {
    values: Object.fromEntries(NAMES.map((name) => [name, [...PARAMETERS[name].start]])),
    side: "output",
    place: [3, 4],
    counts: false,
  };
  const page = {}; // the elements that change

  // --- the operator's arithmetic ---------------------------------------------------------------

  const pair = (values) => `(${values[0]}, ${values[1]})`;

  /** One spatial axis of the present settings, with the length of its output. */
  function axisOf(a) {
    const axis = Object.fromEntries(NAMES.map((name) => [name, state.values[name][a]]));
    axis.out_size =
      (axis.input_size - 1) * axis.stride -
      2 * axis.padding +
      axis.dilation * (axis.kernel_size - 1) +
      axis.output_padding +
      1;
    return axis;
  }

  /** Where an input's tap lands; it may lie outside the output. */
  const landing = (axis, i, k) => i * axis.stride - axis.padding + k * axis.dilation;

  /** The (input, tap) that meet in an output, by trying every tap. */
  function reaching(axis, o) {
    const met = [];
    for (let k = 0; k < axis.kernel_size; ++k) {
      const position = o + axis.padding - k * axis.dilation;
      const i = position / axis.stride;
      if (Number.isInteger(i) && i >= 0 && i < axis.input_size) met.push({ i, k, o });
    }
    return met;
  }

  /** The (output, tap) of an input; `inside` says whether the output has such a pixel. */
  function reached(axis, i) {
    return Array.from({ length: axis.kernel_size }, (_, k) => {
      const o = landing(axis, i, k);
      return { i, k, o, inside: o >= 0 && o < axis.out_size };
    });
  }

  /** What is wrong with the settings, in the package's words where the package would object. */
  function complaint() {
    const v = state.values;
    for (const name of NAMES) {
      if (!v[name].every(Number.isInteger)) return `${name} must be whole numbers`;
      if (Math.min(...v[name]) < PARAMETERS[name].least) {
        const at = `${name}=${pair(v[name])}`;
        return `${at}: each value must be at least ${PARAMETERS[name].least}`;
      }
    }
    for (const a of [0, 1]) {
      const { output_padding: extra, stride, dilation } = axisOf(a);
      const most = Math.max(stride, dilation) - 1;
      if (extra > most) {
        return (
          `output_padding=${pair(v.output_padding)} must be smaller than stride or dilation: ` +
          `along the ${AXES[a]} it is ${extra}, and stride is ${stride}, dilation ${dilation}, ` +
          `so at most ${most}`
        );
      }
    }
    for (const a of [0, 1]) {
      const axis = axisOf(a);
      if (axis.out_size < 1) {
        const side = ["height", "width"][a];
        return (
          `padding=${pair(v.padding)} leaves no output: its ${side} would be (${side} - 1) * ` +
          `stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1 = ` +
          `(${axis.input_size} - 1) * ${axis.stride} - 2 * ${axis.padding} + ${axis.dilation} * ` +
          `(${axis.kernel_size} - 1) + ${axis.output_padding} + 1 = ${axis.out_size}, and must ` +
          `be at least 1; padding along the ${AXES[a]} can be at most ` +
          `${Math.floor((axis.out_size + 2 * axis.padding - 1) / 2)}`
        );
      }
    }
    for (const name of NAMES) {
      if (Math.max(...v[name]) > PARAMETERS[name].most) {
        return `${name}=${pair(v[name])} is legal, but this page draws at most ${PARAMETERS[name].most}`;
      }
    }
    return null;
  }

  const sizeOf = (side) =>
    side === "input" ? state.values.input_size : [axisOf(0).out_size, axisOf(1).out_size];

  // --- the address -----------------------------------------------------------------------------

  /** Two whole numbers out of "3,4", or one for both out of "3". Anything else gives NaN. */
  function parsePair(text) {
    const numbers = text.split(",").map((part) => (/^-?\d+$/.test(part.trim()) ? +part : NaN));
    if (numbers.length === 1) numbers.push(numbers[0]);
    return numbers.length === 2 ? numbers : [NaN, NaN];
  }

  function readHash() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of NAMES) {
      state.values[name] = given.has(name)
        ? parsePair(given.get(name))
        : [...PARAMETERS[name].start];
    }
    state.counts = given.get("counts") === "1";
    state.side = given.has("input") ? "input" : "output";
    state.place = given.has(state.side)
      ? parsePair(given.get(state.side)).map((p) => p || 0)
      : [3, 4];
  }

  /** Soon, and once for many changes: browsers refuse more than some hundred in a minute. */
  function writeHashSoon() {
    clearTimeout(page.writing);
    page.writing = setTimeout(writeHash, 300);
  }

  function writeHash() {
    const parts = NAMES.map((name) => `${name}=${state.values[name].join(",")}`);
    parts.push(`${state.side}=${state.place.join(",")}`);
    if (state.counts) parts.push("counts=1");
    history.replaceState(null, "", `#${parts.join("&")}`);
  }

  // --- drawing ---------------------------------------------------------------------------------

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function makeControls() {
    const rows = NAMES.map((name) => {
      const { label, least, most } = PARAMETERS[name];
      const inputs = AXES.map((axis, a) => {
        const input = element("input", {
          type: "number",
          inputmode: "numeric",
          min: least,
          max: most,
          step: 1,
          "data-name": name,
          "data-axis": a,
          "aria-label": `${label} along the ${axis}`,
        });
        input.addEventListener("input", () => {
          state.values[name][a] = input.value === "" ? NaN : Number(input.value);
          draw();
        });
        return element("td", {}, input);
      });
      return element("tr", {}, element("th", { scope: "row" }, label), ...inputs);
    });
    const head = element(
      "tr",
      {},
      element("td"),
      ...AXES.map((axis) => element("th", { scope: "col" }, axis)),
    );
    page.counts = element("input", { type: "checkbox" });
    page.counts.addEventListener("change", () => {
      state.counts = page.counts.checked;
      draw();
    });
    return element(
      "div",
      { class: "explorer-controls" },
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
      element("label", {}, page.counts, " show how many products each output pixel sums"),
    );
  }

  /** A panel: a heading and a box that scrolls by itself when its grid is too wide. */
  function makePanel(name, heading) {
    page[name] = element("div", { class: "explorer-scroll" });
    page[`${name}Heading`] = element("p", { class: "explorer-heading" }, heading);
    return element(
      "div",
      { class: "explorer-panel", "data-panel": name },
      page[`${name}Heading`],
      page[name],
    );
  }

  /** A table of cells with indices along two edges. */
  function makeGrid(name, [height, width], makeCell, attributes) {
    const head = element("tr", {}, element("td"));
    for (let w = 0; w < width; ++w) head.append(element("th", { scope: "col" }, String(w)));
    const body = element("tbody");
    for (let h = 0; h < height; ++h) {
      const row = element("tr", {}, element("th", { scope: "row" }, String(h)));
      for (let w = 0; w < width; ++w) {
        const cell = makeCell(h, w);
        cell.dataset.h = h;
        cell.dataset.w = w;
        row.append(cell);
      }
      body.append(row);
    }
    page[name].replaceChildren(element("table", attributes, element("thead", {}, head), body));
  }

  const cellOf = (name, h, w) => page[name].querySelector(`td[data-h="${h}"][data-w="${w}"]`);

  function drawGrids() {
    const side = (name) =>
      makeGrid(name, sizeOf(name), () => element("td", { role: "gridcell", tabindex: -1 }), {
        role: "grid",
        "aria-label": `${name} pixels; the arrow keys move`,
      });
    SIDES.forEach(side);
    makeGrid("kernel", state.values.kernel_size, () => element("td"), { "aria-label": "taps" });
    for (const name of SIDES) {
      page[`${name}Heading`].textContent = `${name}, ${sizeOf(name).join(" × ")}`;
    }
    page.kernelHeading.textContent = `kernel, ${state.values.kernel_size.join(" × ")}`;
  }

  /** Colour the pairs of the chosen pixel and say them in words. */
  function drawPairs() {
    const [rows, columns] = [axisOf(0), axisOf(1)];
    const [h, w] = state.place;
    const isOutput = state.side === "output";
    const other = isOutput ? "input" : "output";
    const find = isOutput ? reaching : reached;
    const [alongRows, alongColumns] = [find(rows, h), find(columns, w)];

    for (const name of [...SIDES, "kernel"]) {
      for (const cell of page[name].querySelectorAll("td[data-h]")) {
        cell.className = "";
        cell.textContent = "";
        if (name === "kernel") continue;
        cell.tabIndex = -1;
        cell.removeAttribute("aria-selected");
        cell.setAttribute("aria-label", `${name} ${cell.dataset.h}, ${cell.dataset.w}`);
      }
    }
    if (state.counts) {
      for (const cell of page.output.querySelectorAll("td[data-h]")) {
        const count =
          reaching(rows, +cell.dataset.h).length * reaching(columns, +cell.dataset.w).length;
        cell.textContent = count;
        cell.className = "is-count";
        cell.setAttribute(
          "aria-label",
          `output ${cell.dataset.h}, ${cell.dataset.w}: ${count} products`,
        );
      }
    }
    for (const r of alongRows) {
      for (const c of alongColumns) {
        const tap = cellOf("kernel", r.k, c.k);
        if (!isOutput && !(r.inside && c.inside)) {
          tap.className = "is-cropped";
          tap.textContent = "×";
          continue;
        }
        const [ph, pw] = isOutput ? [r.i, c.i] : [r.o, c.o];
        tap.className = "is-used";
        tap.textContent = `${ph},${pw}`;
        const partner = cellOf(other, ph, pw);
        partner.className = "is-partner";
        partner.textContent = `${r.k},${c.k}`;
        partner.setAttribute("aria-label", `${other} ${ph}, ${pw}, by tap ${r.k}, ${c.k}`);
      }
    }
    for (const name of SIDES) {
      // One stop for the Tab key in each grid.
      const [focusH, focusW] = name === state.side ? state.place : [0, 0];
      cellOf(name, focusH, focusW).tabIndex = 0;
    }
    const chosen = cellOf(state.side, h, w);
    chosen.className += " is-chosen";
    chosen.setAttribute("aria-selected", "true");
    speak(alongRows, alongColumns);
  }

  // --- words -----------------------------------------------------------------------------------

  const several = (count, one) => `${count} ${one}${count === 1 ? "" : "s"}`;
  const list = (items) => (items.length ? items.join("; ") : "none");

  const formula = (axis, { i, k, o }) =>
    `${o} = ${i}·${axis.stride} ${MINUS} ${axis.padding} + ${k}·${axis.dilation}`;

  function speak(alongRows, alongColumns) {
    const [h, w] = state.place;
    const along = [alongRows, alongColumns];
    const lines = [];
    if (state.side === "output") {
      const count = alongRows.length * alongColumns.length;
      lines.push(
        count
          ? `Output (${h}, ${w}) sums ${several(count, "product")}: ` +
              `${alongRows.length} along the rows times ${alongColumns.length} along the columns.`
          : `Output (${h}, ${w}) sums no product: it is the bias alone, or zero.`,
      );
    } else {
      const inside = along.map((found) => found.filter((f) => f.inside).length);
      const taps = alongRows.length * alongColumns.length;
      const lost = taps - inside[0] * inside[1];
      lines.push(
        `Input (${h}, ${w}) reaches ${several(inside[0] * inside[1], "output")} with ` +
          `${several(taps, "tap")}` +
          (lost ? `; ${lost} of them ${lost === 1 ? "lands" : "land"} outside the output.` : "."),
      );
    }
    along.forEach((found, a) => {
      const [o, i, k] = a ? ["ow", "w", "kw"] : ["oh", "h", "kh"];
      const axis = axisOf(a);
      const solved = found.map(
        (f) => formula(axis, f) + (f.inside === false ? " (outside)" : ""),
      );
      lines.push(
        `${a ? "Columns" : "Rows"}: ${o} = ${i}·stride ${MINUS} padding + ${k}·dilation: ` +
          (solved.length ? `${list(solved)}.` : `no ${i} and ${k} give ${state.place[a]}.`),
      );
    });
    page.words.replaceChildren(...lines.map((line) => element("p", {}, line)));
  }

  // --- the whole -------------------------------------------------------------------------------

  function draw() {
    for (const input of page.root.querySelectorAll("input[type=number]")) {
      const value = state.values[input.dataset.name][+input.dataset.axis];
      const shown = Number.isNaN(value) ? "" : String(value);
      // Not while it is being typed: a number may be half there.
      if (input.value !== shown && input !== document.activeElement) input.value = shown;
    }
    page.counts.checked = state.counts;
    const wrong = complaint();
    page.problem.hidden = !wrong;
    page.problem.textContent = wrong ?? "";
    page.grids.hidden = Boolean(wrong);
    page.words.hidden = Boolean(wrong);
    if (NAMES.every((name) => state.values[name].every(Number.isInteger))) writeHashSoon();
    if (wrong) return;
    state.place = sizeOf(state.side).map((size, a) =>
      Math.min(Math.max(state.place[a], 0), size - 1),
    );
    drawGrids();
    drawPairs();
  }

  /** Make the grid's pixel the chosen one. */
  function choose(side, place) {
    if (side === state.side && place.every((p, a) => p === state.place[a])) return;
    state.side = side;
    state.place = place;
    drawPairs();
    writeHashSoon();
  }

  const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

  function onKey(event) {
    const cell = event.target.closest("td[role=gridcell]");
    if (!cell || event.altKey || event.metaKey) return;
    const side = cell.closest("[data-panel]").dataset.panel;
    const size = sizeOf(side);
    let place = [+cell.dataset.h, +cell.dataset.w];
    if (event.key in STEPS && !event.ctrlKey) {
      place = place.map((p, a) => p + STEPS[event.key][a]);
    } else if (event.key === "Home" || event.key === "End") {
      const edge = event.key === "Home" ? [0, 0] : size.map((s) => s - 1);
      place = event.ctrlKey ? edge : [place[0], edge[1]];
    } else {
      return;
    }
    event.preventDefault(); // the arrow keys would scroll the page
    place = place.map((p, a) => Math.min(Math.max(p, 0), size[a] - 1));
    choose(side, place);
    cellOf(side, ...place).focus();
  }

  function onPoint(event) {
    const cell = event.target.closest("td[role=gridcell]");
    if (!cell) return;
    const side = cell.closest("[data-panel]").dataset.panel;
    choose(side, [+cell.dataset.h, +cell.dataset.w]);
  }

  function start() {
    page.root = document.getElementById("explorer");
    page.problem = element("p", { class: "explorer-problem", role: "alert" });
    page.words = element("div", { class: "explorer-words", "aria-live": "polite" });
    page.grids = element(
      "div",
      { class: "explorer-grids" },
      makePanel("input", "input"),
      makePanel("kernel", "kernel"),
      makePanel("output", "output"),
    );
    page.root.replaceChildren(makeControls(), page.problem, page.grids, page.words);
    page.grids.addEventListener("keydown", onKey);
    page.grids.addEventListener("focusin", onPoint);
    page.grids.addEventListener("pointerover", onPoint);
    page.grids.addEventListener("click", onPoint); // a finger points at nothing before it taps
    window.addEventListener("hashchange", () => {
      readHash();
      draw();
      page.root.scrollIntoView({ block: "start" });
    });
    readHash();
    draw();
  }

  start();
})();
