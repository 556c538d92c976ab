"use strict";
// Follows the answers of a question. Text is set as text: nothing of an answer is ever markup.
(() => {
  let source = null;

  function follow(box) {
    if (source) source.close();
    const after = box.querySelector(".after");
    const messages = JSON.parse(after.dataset.messages);
    source = new EventSource(box.dataset.stream);
    source.addEventListener("piece", (event) => {
      const piece = JSON.parse(event.data);
      const answer = box.querySelector(`[data-place="${piece.place}"]`);
      answer.append(piece.text);
      if (piece.ended) {
        answer.setAttribute("aria-busy", "false");
        box.querySelector(`[data-ended="${piece.place}"]`).textContent = piece.error ?? messages[piece.ended] ?? "";
      }
    });
    source.addEventListener("end", () => {
      source.close();
      box.querySelector("[data-stop]")?.remove();
      const vote = box.querySelector("[data-vote]");
      if (vote) vote.hidden = false;
    });
  }

  document.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.id === "answers") follow(document.querySelector("#answers [data-stream]"));
    document.querySelectorAll("[data-title]").forEach((each) => {
      document.getElementById(each.dataset.title).textContent = each.textContent;
      each.remove();
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.id === "prompt") {
      event.target.form.requestSubmit();
    }
  });
})();
