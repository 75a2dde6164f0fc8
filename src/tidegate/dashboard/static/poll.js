// Periodic refresh of a page without a feed.

/**
 * Call `look` every `everyMs` while the tab is visible, and when it becomes visible, until `signal`
 * is aborted. Calls do not overlap.
 */
export function repeat(everyMs, look, signal) {
  let isLooking = false;
  const again = async () => {
    if (document.hidden || isLooking || signal.aborted) return;
    isLooking = true;
    try {
      await look();
    } finally {
      isLooking = false;
    }
  };
  const timer = setInterval(again, everyMs);
  document.addEventListener("visibilitychange", again);
  signal.addEventListener("abort", () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", again);
  });
}
