// Light or dark, before anything is drawn: the browser's wish, or what was chosen here.
//
// A classic script in the head, because a module would come after the first paint.

(() => {
  const key = "longwing.theme";
  let chosen = null;
  try {
    chosen = JSON.parse(localStorage.getItem(key));
  } catch {
    // Nothing is remembered, so the browser's wish it is.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
