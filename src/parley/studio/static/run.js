// The charts of a run: points arrive by server-sent events, are kept in typed arrays, and drawn as the smallest and
// largest value of each pixel column, so that 100,000 of them cost as much as 1,000.
"use strict";
(() => {
  const box = document.getElementById("charts");
  const words = box.dataset;
  const names = words.columns.split(" ");
  const scored = words.scored.split(" "); // columns with a held-out figure: after the step in each of `heldout`
  const HIT = 12; // pixels between a click and a marked step

  class Column {
    constructor() { this.clear(); }
    clear() { this.values = new Float64Array(64); this.length = 0; this.hasValue = false; }
    push(value) {
      if (value === value) this.hasValue = true;
      if (this.length === this.values.length) {
        const larger = new Float64Array(2 * this.length);
        larger.set(this.values);
        this.values = larger;
      }
      this.values[this.length++] = value;
    }
  }

  const columns = new Map(names.map(name => [name, new Column()]));
  const steps = columns.get("step");
  let heldout = [], marks = [], last = "", range = null, weight = 0.9, logarithmic = false;

  // Exponential moving mean, corrected for its start as Adam's are; values that are not numbers are passed over.
  class Smoothed {
    constructor(column) { this.column = column; this.mean = new Column(); this.clear(); }
    clear() { this.mean.clear(); this.sum = 0; this.power = 1; }
    extend() {
      for (let i = this.mean.length; i < this.column.length; i++) {
        const value = this.column.values[i];
        if (!Number.isNaN(value)) {
          this.sum = weight * this.sum + (1 - weight) * value;
          this.power *= weight;
        }
        this.mean.push(this.power < 1 ? this.sum / (1 - this.power) : NaN);
      }
    }
  }

  function firstIndex(x) { // of a step that is at least x
    let low = 0, high = steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps.values[middle] < x) low = middle + 1; else high = middle;
    }
    return low;
  }

  // Indices of the points to draw between two indices: at most two a pixel column.
  function thinned(values, start, end, width) {
    const kept = [];
    if (end - start <= 2 * width) {
      for (let i = start; i < end; i++) kept.push(i);
      return kept;
    }
    for (let column = 0; column < width; column++) {
      const from = start + Math.floor((end - start) * column / width);
      const to = start + Math.floor((end - start) * (column + 1) / width);
      let low = -1, high = -1;
      for (let i = from; i < to; i++) {
        const value = values[i];
        if (value !== value) continue;
        if (low < 0 || value < values[low]) low = i;
        if (high < 0 || value > values[high]) high = i;
      }
      if (low < 0) { if (to > from) kept.push(from); continue; } // a gap stays one
      kept.push(Math.min(low, high));
      if (low !== high) kept.push(Math.max(low, high));
    }
    return kept;
  }

  function short(value) { // as an axis shows it: 20k, 1.5M, 2e-4
    if (value === null) return "";
    const size = Math.abs(value);
    if (size >= 1e6) return +(value / 1e6).toPrecision(6) + "M";
    if (size >= 1e4) return +(value / 1e3).toPrecision(6) + "k";
    return size > 0 && size < 1e-2 ? (+value.toPrecision(6)).toExponential().replace("e+", "e") : String(+value.toPrecision(6));
  }

  const drawable = value => value !== value || (logarithmic && value <= 0) ? null : value;

  class Chart {
    constructor(figure) {
      this.figure = figure;
      this.column = columns.get(figure.dataset.column);
      this.isLoss = figure.dataset.column === "loss";
      this.heldout = scored.indexOf(figure.dataset.column) + 1; // 0: has none
      this.isOptional = figure.hidden; // shown once its column has a value
      this.isNoisy = "smooth" in figure.dataset;
      this.smoothed = new Smoothed(this.column);
      this.make();
      new ResizeObserver(() => this.resize()).observe(figure);
    }

    size() {
      const style = getComputedStyle(this.figure);
      const width = this.figure.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
      return {width: Math.max(200, Math.floor(width)), height: this.isLoss ? 300 : 170};
    }

    resize() {
      if (this.plot.width === this.size().width) return;
      this.plot.setSize(this.size());
      schedule();
    }

    make() {
      if (this.plot) this.plot.destroy();
      const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
      const value = (plot, number) => number == null ? "–" : String(+number.toPrecision(4));
      const axis = {
        stroke: colour("soft"), grid: {stroke: colour("line"), width: 1}, ticks: {show: false},
        font: "12px system-ui, sans-serif", values: (plot, ticks) => ticks.map(short),
      };
      const line = {value, points: {show: false}};
      const series = [
        {label: words.step, value: (plot, x) => x == null ? "–" : String(x)},
        {...line, label: words.raw, stroke: colour(this.isNoisy ? "raw" : "new"), width: this.isNoisy ? 1 : 2},
      ];
      if (this.isNoisy) series.push({...line, label: words.smooth, stroke: colour("new"), width: 2});
      if (this.heldout) series.push(
        {label: words.heldout, value, stroke: colour("held"), dash: [4, 4], width: 1.5, spanGaps: true,
         points: {show: true, size: 8, fill: colour("held")}},
      );
      if (this.isLoss) series.push(
        {label: words.marks, value, stroke: colour("warn"), paths: () => null,
         points: {show: true, size: 11, width: 2, stroke: colour("warn"), fill: colour("card")}},
      );
      this.plot = new uPlot({
        ...this.size(),
        series,
        axes: [axis, {...axis, size: 62}],
        scales: {x: {time: false, range: () => this.bounds()}, y: {distr: logarithmic ? 3 : 1}},
        cursor: {
          sync: {key: "run"}, drag: {x: true, y: false, setScale: false},
          bind: {dblclick: () => () => { range = null; schedule(); return null; }},
        },
        hooks: {setSelect: [plot => this.select(plot)]},
      }, series.map(() => []), this.figure);
      this.plot.root.querySelector("canvas").setAttribute("aria-hidden", "true");
      if (this.isLoss) this.plot.over.addEventListener("click", event => this.click(event));
    }

    bounds() {
      if (range) return range;
      const from = steps.length ? Math.min(steps.values[0], heldout.length ? heldout[0][0] : Infinity) : 0;
      return [from, Math.max(from + 1, steps.length ? steps.values[steps.length - 1] : 1)];
    }

    select(plot) {
      if (plot.select.width < 5) return;
      range = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
      plot.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
      schedule();
    }

    click(event) {
      const at = event.clientX - this.plot.over.getBoundingClientRect().left;
      let nearest = null, distance = HIT;
      for (const [step] of marks) {
        const away = Math.abs(this.plot.valToPos(step, "x") - at);
        if (away <= distance) { nearest = step; distance = away; }
      }
      if (nearest !== null) htmx.ajax("GET", words.batches + "?step=" + nearest, "#batch");
    }

    data() {
      this.smoothed.extend();
      const [low, high] = this.bounds();
      const start = Math.max(0, firstIndex(low) - 1), end = Math.min(this.column.length, firstIndex(high) + 1);
      const xs = [], raw = [], mean = [];
      for (const i of thinned(this.column.values, start, end, Math.floor(this.plot.bbox.width / devicePixelRatio))) {
        xs.push(steps.values[i]);
        raw.push(drawable(this.column.values[i]));
        mean.push(drawable(this.smoothed.mean.values[i]));
      }
      if (this.heldout) {
        const dots = heldout.map(row => [row[0], row[this.heldout]]).filter(([, value]) => value != null);
        const merged = withSingle([xs, raw, mean], dots, this.isLoss ? marks : [], low, high);
        return this.isLoss ? merged : merged.slice(0, 4);
      }
      return this.isNoisy ? [xs, raw, mean] : [xs, raw];
    }

    draw() {
      if (this.isOptional) this.figure.hidden = !this.column.hasValue;
      if (this.figure.hidden) return;
      const data = this.data();
      this.plot.batch(() => this.plot.setData(data)); // a batch is drawn at once
    }
  }

  // The single points of held-out losses and marked steps, between the points of the lines.
  function withSingle([xs, raw, mean], dots, marks, low, high) {
    const single = [...dots.map(([x, y]) => [x, y, undefined]), ...marks.map(([x, y]) => [x, undefined, y])]
      .filter(([x]) => x >= low && x <= high).sort((a, b) => a[0] - b[0]);
    const merged = [[], [], [], [], []];
    const put = (...row) => row.forEach((value, i) => merged[i].push(value));
    let next = 0;
    const flush = until => {
      for (; next < single.length && single[next][0] < until; next++) {
        const [x, held, mark] = single[next];
        const same = merged[0].length && merged[0][merged[0].length - 1] === x;
        if (!same) { put(x, undefined, undefined, drawable(held), drawable(mark)); continue; }
        const at = merged[0].length - 1;
        if (held != null) merged[3][at] = drawable(held);
        if (mark != null) merged[4][at] = drawable(mark);
      }
    };
    xs.forEach((x, i) => {
      flush(x);
      put(x, raw[i], mean[i], undefined, undefined);
      flush(x + 1e-9);
    });
    flush(Infinity);
    return merged;
  }

  // -- drawing: one chart a frame, so that none takes longer than one -----------------------------------------------
  const charts = [...box.querySelectorAll("figure")].map(figure => new Chart(figure));
  let waiting = new Set(), framed = false;

  function schedule() {
    charts.forEach(chart => waiting.add(chart));
    if (!framed) { framed = true; requestAnimationFrame(frame); }
  }

  function frame() {
    const [chart] = waiting;
    waiting.delete(chart);
    chart.draw();
    framed = waiting.size > 0;
    if (framed) requestAnimationFrame(frame);
  }

  function add(batch) {
    if (batch.restarted) {
      columns.forEach(column => column.clear());
      charts.forEach(chart => chart.smoothed.clear());
      heldout = [];
      marks = [];
    }
    for (const point of batch.points) point.forEach((value, i) => {
      const column = columns.get(names[i]);
      while (i && column.length < steps.length - 1) column.push(NaN); // steps before had no such figure
      column.push(value === null ? NaN : value);
    });
    heldout.push(...batch.heldout.filter(([step]) => step !== null));
    marks.push(...batch.marks.filter(([step, loss]) => step !== null && loss !== null));
    box.dataset.points = steps.length;
    schedule();
  }

  // -- the stream ---------------------------------------------------------------------------------------------------
  const offline = document.getElementById("offline");
  htmx.createEventSource = url => {
    const source = new SharedStream(once => {
      const query = new URLSearchParams(last ? {after: last} : {});
      if (once) query.set("once", "yes");
      return url + "?" + query;
    }, ["points", "status", "actions", "faults", "answers"], mode => { box.dataset.stream = mode; });
    source.addEventListener("open", () => { offline.hidden = true; });
    source.addEventListener("error", () => { offline.hidden = false; });
    source.addEventListener("points", event => { last = event.lastEventId; add(JSON.parse(event.data)); });
    return source;
  };

  // -- what the reader sets -----------------------------------------------------------------------------------------
  document.getElementById("smoothing").addEventListener("input", event => {
    weight = +event.target.value;
    charts.forEach(chart => chart.smoothed.clear());
    schedule();
  });
  const remake = () => { charts.forEach(chart => chart.make()); schedule(); };
  document.getElementById("log").addEventListener("change", event => { logarithmic = event.target.checked; remake(); });
  document.getElementById("whole").addEventListener("click", () => { range = null; schedule(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", remake);
})();
