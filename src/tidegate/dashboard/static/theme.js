// The colours that were chosen, set before anything is painted. "auto" follows the system.
"use strict";
(() => {
  const chosen = localStorage.getItem("tidegate.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
