// The key that a person entered: kept in this tab's storage only, sent in a header, deleted with
// the tab.

const NAME = "tidegate.key";
const ROLES = ["viewer", "operator", "admin"];
const listeners = new Set();
let [role, isReader] = [ROLES[0], false];

/**
 * Set the role of the person, and whether it reads prompts and answers. This only affects the
 * display: the gateway checks every request.
 */
export const actAs = (given, readsBodies) => ([role, isReader] = [given, readsBodies]);
export const readsBodies = () => isReader;
export const may = (needed) => ROLES.indexOf(role) >= ROLES.indexOf(needed);
export const whyNot = (needed) => `Requires the role ${needed}. Your role is ${role}.`;

export const key = () => sessionStorage.getItem(NAME);

export function remember(entered) {
  sessionStorage.setItem(NAME, entered);
}

export function forget() {
  sessionStorage.removeItem(NAME);
}

/** Delete the key and notify all listeners, with the problem if there is one. */
export function signOut(problem = null) {
  forget();
  for (const listener of listeners) listener(problem);
}

export function onSignOut(listener) {
  listeners.add(listener);
}
