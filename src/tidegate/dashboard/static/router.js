// Routes: from the URL's fragment to a page, and navigation between pages.

import { Problem } from "./api.js";
import { fill, h } from "./dom.js";
import * as keyboard from "./keyboard.js";
import { PAGES } from "./pages/table.js";
import * as stuck from "./stuck.js";
import { empty, failed, leaveDialogs, loading } from "./ui.js";

let leaving = new AbortController();
let inside = new AbortController();
let opened = false;

/** Parse `#/requests/17?status=dead` to `{ path: "/requests/17", query }`. */
function target() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  return { path: path || "/", query: new URLSearchParams(query ?? "") };
}

/** Return the URL of a view: `link("/requests", { status: "dead" })`. */
export function link(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null);
  const text = new URLSearchParams(given).toString();
  return `#${path}${text ? `?${text}` : ""}`;
}

/** Change the query of the URL without opening the page again. */
export function note(query) {
  history.replaceState(null, "", link(target().path, query));
}

/** Decode a part of the URL; null if its escapes are invalid. */
function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return null;
  }
}

function matched(path) {
  for (const page of PAGES) {
    const wanted = page.path.split("/");
    const given = path.split("/");
    if (wanted.length !== given.length) continue;
    const params = {};
    const fits = wanted.every((part, at) => {
      if (!part.startsWith(":")) return part === given[at];
      params[part.slice(1)] = decoded(given[at]);
      return Boolean(params[part.slice(1)]);
    });
    if (fits) return { page, params };
  }
  return null;
}

/** Draw the navigation, and follow changes of the URL from now on. */
export function start() {
  const links = PAGES.filter((page) => page.nav);
  fill(
    document.getElementById("nav"),
    links.map((page) => h("a", { href: link(page.path) }, page.nav)),
  );
  inside = new AbortController();
  stuck.follow(inside.signal);
  keyboard.follow(inside.signal);
  window.addEventListener("hashchange", show);
  show();
}

/** Leave the open page; its requests in progress are aborted. */
export function stop() {
  window.removeEventListener("hashchange", show);
  leaving.abort();
  inside.abort();
  leaveDialogs();
  fill(document.getElementById("nav"));
}

async function show() {
  leaving.abort();
  leaveDialogs();
  leaving = new AbortController();
  const { signal } = leaving;
  const { path, query } = target();
  const found = matched(path);
  const main = document.getElementById("main");
  markNavigation(path);
  if (found === null) {
    document.title = "Not found · Tidegate";
    fill(main, empty("Page not found", path, h("a", { href: "#/" }, "Overview")));
    return;
  }
  document.title = `${found.page.title} · Tidegate`;
  fill(main, loading());
  try {
    const dressed = wear([found.page.style ?? []].flat());
    const [module] = await Promise.all([found.page.load(), dressed]);
    if (signal.aborted) return;
    fill(main);
    await module.open(main, { params: found.params, query, signal });
    if (!signal.aborted && opened) main.focus({ preventScroll: true });
    opened = true;
  } catch (error) {
    if (signal.aborted) return;
    const problem = error instanceof Problem ? error : new Problem({ detail: error.message });
    fill(main, failed(problem, show));
    if (!(error instanceof Problem)) throw error;
  }
}

function markNavigation(path) {
  const head = `#/${path.split("/")[1]}`;
  for (const one of document.querySelectorAll("#nav a")) {
    if (one.getAttribute("href") === head) {
      one.setAttribute("aria-current", "page");
      one.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else one.removeAttribute("aria-current");
  }
}

/**
 * Enable the stylesheets of a page, and disable those of all others; resolves once they are loaded.
 */
async function wear(styles) {
  for (const sheet of document.querySelectorAll("link[data-page]")) {
    sheet.disabled = !styles.includes(sheet.dataset.page);
  }
  const isThere = (style) => document.querySelector(`link[data-page="${style}"]`) !== null;
  await Promise.all(styles.filter((style) => !isThere(style)).map(fetched));
}

function fetched(style) {
  const sheet = h("link", {
    rel: "stylesheet",
    href: `static/pages/${style}`,
    data: { page: style },
  });
  return new Promise((resolve, reject) => {
    const lost = () => reject(new Problem({ detail: `The stylesheet ${style} could not be loaded.` }));
    sheet.addEventListener("load", resolve);
    sheet.addEventListener("error", () => lost(sheet.remove()));
    document.head.append(sheet);
  });
}
