// The selected colours, set before the first paint. "auto" follows the system.
"use strict";
(() => {
  const chosen = localStorage.getItem("tidegate.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
