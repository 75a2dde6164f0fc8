// A page that looks again by itself, for where there is no feed.

/**
 * Call `look` every so many milliseconds while the tab is seen, and whenever it is seen again, until
 * `signal` is aborted. One look ends before the next begins.
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
