// The key that a person entered: kept for this tab alone, shown in a header, gone with the tab.

const NAME = "tidegate.key";
const ROLES = ["viewer", "operator", "admin"];
const listeners = new Set();
let [role, isReader] = [ROLES[0], false];

/** The role of the person who signed in, and whether it reads prompts and answers, as the gateway says it: it checks every request itself. */
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

/** Forget the key, and tell everybody who shows something, with the problem where there was one. */
export function signOut(problem = null) {
  forget();
  for (const listener of listeners) listener(problem);
}

export function onSignOut(listener) {
  listeners.add(listener);
}
