// Entry point: sign-in, then the page of the URL.

import { ask, get, Problem } from "./api.js";
import { fill, h } from "./dom.js";
import * as router from "./router.js";
import * as session from "./session.js";
import { failed, field, loading, said, toast } from "./ui.js";

const THEMES = {
  auto: ["◐", "Theme: system"],
  light: ["☀", "Theme: light"],
  dark: ["☾", "Theme: dark"],
};
const PLACE = "tidegate.place";
const main = document.getElementById("main");
const who = document.getElementById("who");
const signOut = document.getElementById("sign-out");
// Why the link of the start-up page did not sign in; shown once.
const CODES = {
  used: "This sign-in link works once, within ten minutes. Start Tidegate again for a new one, or enter a key.",
  issuer: "The issuer (OIDC_ISSUER) does not answer, so single sign-on is unavailable. Try again, or enter a key.",
  busy: "The issuer rejected many sign-ins from your network. Try again in a minute, or enter a key.",
  refused: "The issuer rejected the sign-in. Try again.",
  role: "Your account has no role on this gateway. Ask its administrator for one.",
  state: "This sign-in was started in another browser, was completed already, or took longer than ten minutes. Try again.",
  unavailable: "PostgreSQL does not answer, so the sign-in link cannot be checked. Enter a key.",
};
const address = new URL(location.href);
let why = CODES[address.searchParams.get("sign-in")] ?? "";
if (address.searchParams.has("sign-in")) {
  address.searchParams.delete("sign-in");
  history.replaceState(null, "", address);
}
let inside = false;

async function enter() {
  if (!inside) fill(main, loading());
  try {
    const { operator, role, reads_bodies: reads } = await get("dashboard/session", { keepSession: true });
    [inside, why] = [true, ""];
    comeBack();
    session.actAs(role, reads);
    signOut.hidden = false;
    fill(who, h("span", { class: "badge", title: `Signed in by ${operator}, with the role ${role}` }, role));
    router.start();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (error.status === 401 || error.status === 403) askForKey(session.key() ? error : null, error);
    else fill(main, failed(error, enter));
  }
}

/**
 * Show the sign-in form. `refused`: the problem of the entered key. `asked`: the problem without a
 * key.
 */
function askForKey(refused, asked) {
  inside = false;
  signOut.hidden = true;
  fill(who);
  session.forget();
  const key = field("key", "Key", {
    type: "password",
    hint: "The operator's key (ADMIN_TOKEN, or the file operator.key in DATA_DIR), or an API key with a role. It is kept in this tab only.",
    autocomplete: "current-password",
    spellcheck: "false",
  });
  if (refused) key.complain(said(refused));
  const form = h(
    "form",
    { on: { submit: (event) => shown(event, key) } },
    h("h1", {}, "Sign in"),
    asked?.status === 403 && !refused && h("p", {}, said(asked)),
    !refused && why && h("p", {}, why),
    key.element,
    h("button", { class: "button main", type: "submit" }, "Sign in"),
    singleSignOn(),
  );
  fill(main, h("section", { class: "card sign-in" }, form));
  document.title = "Sign in · Tidegate";
  key.input.focus();
}

/**
 * Return a link to the issuer's page for single sign-on. Afterwards the open view is shown again.
 */
function singleSignOn() {
  const keep = () => sessionStorage.setItem(PLACE, location.hash);
  const go = h("a", { class: "button", href: "sign-in", hidden: true, on: { click: keep } }, "Sign in with single sign-on");
  get("dashboard/ways-in", { keepSession: true })
    .then((ways) => (go.hidden = !ways.single_sign_on))
    .catch(() => {}); // the form itself reports what is unavailable
  return go;
}

/** Restore the view that was open before the redirect to the issuer. */
function comeBack() {
  const hash = sessionStorage.getItem(PLACE);
  sessionStorage.removeItem(PLACE);
  if (hash?.startsWith("#/")) location.hash = hash;
}

function shown(event, key) {
  event.preventDefault();
  const entered = key.value();
  if (!entered) {
    key.complain("Enter a key.");
    return;
  }
  if (!/^[\x21-\x7e]+$/.test(entered)) {
    key.complain("A key has no spaces, only ASCII letters, digits and punctuation.");
    return;
  }
  session.remember(entered);
  enter();
}

session.onSignOut((problem) => {
  if (!inside) return;
  router.stop();
  askForKey(problem, null);
});
// Shows a problem of an action that does not show it itself, such as of data that its dialog needs.
window.addEventListener("unhandledrejection", (event) => {
  if (!(event.reason instanceof Problem)) return;
  event.preventDefault();
  if (event.reason.status !== 401) toast(said(event.reason), "bad"); // a 401 signs out, where it is shown
});
signOut.addEventListener("click", async () => {
  try {
    await ask("POST", "dashboard/sign-out", { keepSession: true });
  } catch (problem) {
    if (!(problem instanceof Problem)) throw problem;
    // A key is deleted here; a cookie can only be ended by the gateway.
    if (!session.key()) {
      toast(`You are still signed in. ${said(problem)} Try again.`, "bad");
      return;
    }
  }
  session.signOut();
});

function wearTheme(theme) {
  const [sign, words] = THEMES[theme];
  const button = document.getElementById("theme");
  fill(button, h("span", { "aria-hidden": "true" }, sign));
  button.setAttribute("aria-label", words);
  button.title = words;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem("tidegate.theme", theme);
  document.dispatchEvent(new CustomEvent("tidegate:theme"));
}

document.getElementById("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const now = localStorage.getItem("tidegate.theme") ?? "auto";
  wearTheme(names[(names.indexOf(now) + 1) % names.length]);
});
wearTheme(localStorage.getItem("tidegate.theme") ?? "auto");
enter();
