// The key that a person entered: kept for this tab alone, shown in a header, gone with the tab.

const NAME = "tidegate.key";
const listeners = new Set();

export const key = () => sessionStorage.getItem(NAME);

export function remember(entered) {
  sessionStorage.setItem(NAME, entered);
}

export function forget() {
  sessionStorage.removeItem(NAME);
}

/** Forget the key, and tell everybody who shows something, with the problem where there was one. */
export function signOut(problem = null) {
  forget();
  for (const listener of listeners) listener(problem);
}

export function onSignOut(listener) {
  listeners.add(listener);
}
