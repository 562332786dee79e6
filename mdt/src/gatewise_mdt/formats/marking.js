// Phrases and boxes mark each other: on the HTML view in each article, and on the page of a review, which has none, where it asks.

function marking(article) {
  const names = mark => mark.dataset.of.split(" ");
  const twins = (one, triple) =>
    one.dataset.triple ? one.dataset.triple === triple : one.dataset.node === triple.split(".")[0];
  function light(target) {
    const marks = article.querySelectorAll("mark");
    const parts = article.querySelectorAll(".node,.triple");
    const mark = target && target.closest("mark");
    const part = target && (target.closest(".triple") || target.closest(".node"));
    for (const one of marks) {
      let on = one === mark;
      if (part && part.dataset.triple) on = names(one).includes(part.dataset.triple);
      else if (part) on = names(one).some(name => name.split(".")[0] === part.dataset.node);
      one.classList.toggle("on", on);
    }
    for (const one of parts) {
      let on = one === part || (part && one.contains(part));
      // On the page of reviews a triple stands in the drawing and in the editor.
      if (part && part.dataset.triple) on ||= twins(one, part.dataset.triple);
      if (mark && one.dataset.triple) on = names(mark).includes(one.dataset.triple);
      else if (mark) on = names(mark).some(name => name.split(".")[0] === one.dataset.node);
      one.classList.toggle("on", Boolean(on));
    }
  }
  const back = () => light(article.contains(document.activeElement) ? document.activeElement : null);
  article.addEventListener("pointerover", event => {
    const target = event.target.closest("mark,.node,.triple");
    if (target) light(event.target); else back();
  });
  article.addEventListener("pointerleave", back);
  article.addEventListener("focusin", event => light(event.target));
  article.addEventListener("focusout", () => light(null));
  article.addEventListener("keydown", event => {
    if (event.key === "Escape") document.activeElement.blur();
  });
}

for (const article of document.querySelectorAll("article")) marking(article);
