"use strict";
// The editor of the train page: line numbers, lines with errors, completion. The page works without it.
(() => {
  const editor = document.getElementById("settings");
  const lines = document.getElementById("lines");
  const list = document.getElementById("completions");
  let found = [];
  let active = -1;
  let request = 0;

  function numberLines() {
    const wrong = new Set([...document.querySelectorAll("#train [data-line]")].map((each) => Number(each.dataset.line)));
    lines.replaceChildren(...editor.value.split("\n").map((_, index) => {
      const line = document.createElement("span");
      line.textContent = `${index + 1}\n`;
      line.className = wrong.has(index + 1) ? "wrong" : "";
      return line;
    }));
    lines.scrollTop = editor.scrollTop;
  }

  function goTo(number) {
    const before = editor.value.split("\n").slice(0, number - 1);
    const start = before.join("\n").length + (before.length ? 1 : 0);
    const end = editor.value.indexOf("\n", start);
    editor.focus();
    editor.setSelectionRange(start, end < 0 ? editor.value.length : end);
  }

  function hide() {
    list.hidden = true;
    active = -1;
    editor.removeAttribute("aria-activedescendant");
  }

  function choose(index) {
    active = index;
    [...list.children].forEach((each, place) => each.setAttribute("aria-selected", String(place === index)));
    if (index >= 0) {
      editor.setAttribute("aria-activedescendant", list.children[index].id);
      list.children[index].scrollIntoView({ block: "nearest" });
    }
  }

  function accept(index) {
    const { insert, replaces } = found[index];
    const end = editor.selectionStart;
    const line = editor.value.slice(editor.value.lastIndexOf("\n", end - 1) + 1, end);
    const indent = line.match(/^ */)[0];
    editor.setRangeText(insert.replaceAll("\n", `\n${indent}`), end - replaces, end, "end");
    hide();
    editor.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function show(items) {
    found = items;
    list.replaceChildren(...items.map((item, index) => {
      const entry = document.createElement("li");
      const name = document.createElement("b");
      const detail = document.createElement("span");
      name.textContent = item.label;
      detail.textContent = item.detail;
      entry.append(name, " ", detail);
      entry.id = `completion-${index}`;
      entry.setAttribute("role", "option");
      entry.addEventListener("mousedown", (event) => { event.preventDefault(); accept(index); });
      return entry;
    }));
    list.hidden = !items.length;
    active = -1;
  }

  async function complete() {
    const mine = ++request;
    const before = editor.value.slice(0, editor.selectionStart).split("\n");
    const body = new URLSearchParams({ settings: editor.value, line: before.length, column: before.at(-1).length });
    const response = await fetch("/train/complete", { method: "POST", headers: { "X-CSRF-Token": document.body.dataset.csrf }, body });
    if (mine === request && response.ok && document.activeElement === editor) show(await response.json());
  }

  editor.addEventListener("keydown", (event) => {
    const open = !list.hidden;
    if (open && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
      event.preventDefault();
      const step = event.key === "ArrowDown" ? 1 : -1;
      choose((active + step + found.length) % found.length);
    } else if (open && event.key === "Enter" && active >= 0) {
      event.preventDefault();
      accept(active);
    } else if (open && event.key === "Escape") {
      event.preventDefault();
      hide();
    } else if (event.key === " " && event.ctrlKey) {
      event.preventDefault();
      complete();
    } else if (event.key === "Backspace" && editor.selectionStart === editor.selectionEnd) {
      const start = editor.value.lastIndexOf("\n", editor.selectionStart - 1) + 1;
      const before = editor.value.slice(start, editor.selectionStart);
      if (before.length < 2 || before.trim()) return;
      event.preventDefault(); // one level of the indentation that Enter gave
      editor.setRangeText("", editor.selectionStart - 2, editor.selectionStart, "end");
      editor.dispatchEvent(new Event("input", { bubbles: true }));
    } else if (event.key === "Enter") {
      event.preventDefault();
      const start = editor.value.lastIndexOf("\n", editor.selectionStart - 1) + 1;
      const line = editor.value.slice(start, editor.selectionStart);
      const indent = line.match(/^ */)[0] + (/:\s*$/.test(line) ? "  " : "");
      editor.setRangeText(`\n${indent}`, editor.selectionStart, editor.selectionEnd, "end");
      editor.dispatchEvent(new Event("input", { bubbles: true }));
    }
  });
  editor.addEventListener("input", (event) => {
    numberLines();
    if (event.isTrusted) complete(); else hide();
  });
  editor.addEventListener("blur", hide);
  editor.addEventListener("scroll", () => { lines.scrollTop = editor.scrollTop; });
  document.addEventListener("click", (event) => {
    const place = event.target.closest("[data-goto]");
    if (place) goTo(Number(place.dataset.goto));
  });
  document.addEventListener("htmx:afterSettle", () => {
    const changed = document.querySelector("[data-settings]");
    if (changed) {
      editor.value = changed.dataset.settings;
      changed.remove();
    }
    numberLines();
  });
  // Enter in a field of the form must not start a run: it is taken as a change of that field.
  document.getElementById("train").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target.matches("input")) {
      event.preventDefault();
      event.target.dispatchEvent(new Event("change", { bubbles: true }));
    }
  });
  numberLines();
})();
