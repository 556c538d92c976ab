// The data page: files are sent as they are, with their progress; and the line of the length limit.
"use strict";
(() => {
  const drop = document.getElementById("drop");
  const messages = document.getElementById("messages");

  function say(text) {
    const line = document.createElement("p");
    line.className = "message";
    line.textContent = text;
    messages.replaceChildren(line);
  }

  function send(file) {
    const request = new XMLHttpRequest(); // fetch says nothing of the progress of a body
    const bar = document.getElementById("sent");
    bar.hidden = false;
    request.open("POST", "/data/uploads?name=" + encodeURIComponent(file.name));
    request.setRequestHeader("X-CSRF-Token", document.body.dataset.csrf);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.addEventListener("progress", event => { if (event.lengthComputable) bar.value = event.loaded / event.total; });
    request.addEventListener("load", () => {
      if (request.status === 200) { location.assign("/data"); return; }
      bar.hidden = true;
      let text = request.responseText;
      try { text = JSON.parse(text).error; } catch { /* a refusal is plain text */ }
      say(text);
    });
    request.addEventListener("error", () => { bar.hidden = true; say(drop.dataset.failed); });
    request.send(file);
  }

  document.getElementById("file").addEventListener("change", event => { if (event.target.files[0]) send(event.target.files[0]); });
  drop.addEventListener("submit", event => event.preventDefault());
  for (const name of ["dragover", "drop"]) document.addEventListener(name, event => {
    event.preventDefault(); // a file that misses the box would replace the page
    drop.classList.toggle("over", name === "dragover");
  });
  document.addEventListener("dragleave", event => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", event => { if (event.dataTransfer.files[0]) send(event.dataTransfer.files[0]); });

  // -- lengths ------------------------------------------------------------------------------------------------------
  const BINS = 100;

  function prepareLengths(figure) {
    const counts = JSON.parse(figure.dataset.histogram); // [length, rows], the length within 1%
    const svg = figure.querySelector("svg"), line = figure.querySelector("#limit-line"), number = figure.querySelector("#limit");
    const longest = +line.max, width = longest / BINS;
    const bins = new Array(BINS).fill(0), lengths = new Array(BINS).fill(0);
    for (const [length, rows] of counts) {
      const bin = Math.min(BINS - 1, Math.floor(length / width));
      bins[bin] += rows;
      lengths[bin] = Math.max(lengths[bin], length);
    }
    const highest = Math.max(...bins);
    const make = (name, attributes) => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
      svg.append(element);
      return element;
    };
    const bars = bins.map((rows, i) => {
      const height = rows ? Math.max(2, 210 * rows / highest) : 0;
      return make("rect", {x: i * 1000 / BINS + 1, y: 220 - height, width: 1000 / BINS - 2, height});
    });
    const mark = make("line", {y1: 0, y2: 220, class: "limit"});
    const axis = figure.querySelector(".axis");
    for (let k = 0; k <= 4; k++) {
      const label = document.createElement("span");
      label.textContent = Math.round(longest * k / 4).toLocaleString(document.documentElement.lang);
      axis.append(label);
    }

    function show(limit) {
      const at = Math.min(999, 1000 * limit / longest); // a limit beyond the longest row is at the edge
      mark.setAttribute("x1", at);
      mark.setAttribute("x2", at);
      bars.forEach((bar, i) => bar.setAttribute("class", lengths[i] > limit ? "cut" : ""));
      let rows = 0, tokens = 0;
      for (const [length, count] of counts) if (length > limit) { rows += count; tokens += count * (length - limit); }
      const number = value => value.toLocaleString(document.documentElement.lang);
      const words = {rows: number(rows), tokens: number(tokens), share: (100 * tokens / figure.dataset.total).toPrecision(2)};
      const text = rows ? figure.dataset.cut : figure.dataset.none;
      figure.querySelector("#cut").textContent = text.replace(/\{(\w+)\}/g, (_, name) => words[name]);
    }

    line.addEventListener("input", () => { number.value = line.value; show(+line.value); });
    number.addEventListener("input", () => { line.value = number.value; show(+number.value); });
    const drag = event => {
      const box = svg.getBoundingClientRect();
      const limit = Math.round(longest * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
      number.value = line.value = Math.max(8, limit);
      show(+number.value);
    };
    svg.addEventListener("pointerdown", event => { svg.setPointerCapture(event.pointerId); drag(event); });
    svg.addEventListener("pointermove", event => { if (svg.hasPointerCapture(event.pointerId)) drag(event); });
    show(+number.value);
  }

  document.body.addEventListener("change", event => {
    if (event.target.id !== "format") return;
    for (const fields of document.querySelectorAll("#mapping fieldset")) // those of other formats are not sent
      fields.hidden = fields.disabled = fields.dataset.format !== event.target.value;
  });

  document.body.addEventListener("htmx:afterSwap", event => {
    if (event.target.id !== "checks") return;
    const figure = document.getElementById("lengths");
    if (figure) prepareLengths(figure);
    const filter = document.getElementById("found-by");
    for (const button of document.querySelectorAll("[data-found-by]")) {
      filter.append(new Option(button.dataset.foundBy, button.dataset.foundBy));
      button.addEventListener("click", () => {
        filter.value = button.dataset.foundBy;
        filter.dispatchEvent(new Event("change", {bubbles: true}));
        document.getElementById("rows-title").scrollIntoView();
      });
    }
  });
})();
