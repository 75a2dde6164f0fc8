// Builds the page from elements and text, never from HTML, so that text of tenants stays text.

import * as session from "./session.js";

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "circle", "line", "rect", "g", "polyline", "title"]);

/**
 * Create an element. `props`: `class`, `data` (an object), `on` (event -> listener), `needs` (the
 * role without which a button is disabled, with the reason), properties such as `value`, and
 * attributes. Null and false are left out; `children` may be nested lists.
 */
export function h(tag, props = {}, ...children) {
  const element = SVG_TAGS.has(tag)
    ? document.createElementNS(SVG, tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.setAttribute("class", value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "needs") {
      if (!session.may(value)) Object.assign(element, { disabled: true, title: session.whyNot(value) });
    } else if (name === "on") {
      for (const [event, listener] of Object.entries(value)) {
        element.addEventListener(event, listener);
      }
    } else if (name === "value" || name === "disabled" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

/** Replace the content of an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  add(element, children);
  return element;
}

/** Set a text only if it differs, so that nothing is painted, selected or announced again. */
export function say(element, text) {
  const wanted = String(text);
  if (element.textContent !== wanted) element.textContent = wanted;
}

const RIGHT_TO_LEFT = "[\\p{Script=Arabic}\\p{Script=Hebrew}\\p{Script=Syriac}\\p{Script=Thaana}\\p{Script=Nko}\\p{Script=Adlam}]";
const RUNS = new RegExp(`(${RIGHT_TO_LEFT}(?:[^\\p{Script=Latin},:;.·]*${RIGHT_TO_LEFT})?)`, "u");

/**
 * Set a text that is composed of names and figures only if it differs. A right-to-left name is
 * isolated, so that the figure after it stays there.
 */
export function sayComposed(element, text) {
  if (element.textContent === text) return;
  fill(element, text.split(RUNS).map((part, at) => (at % 2 ? h("bdi", {}, part) : part)));
}

/** Set an attribute only if it differs; null removes it. */
export function mark(element, name, value) {
  if (value === null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/**
 * Keep the elements of rows while their content changes.
 *
 * `make(item)` returns `{ element, update(item) }`. Elements keep their focus, because they are
 * moved only if the order of the keys has changed.
 */
export function keyed(parent, make) {
  const rows = new Map();
  return (items, keyOf) => {
    const wanted = new Map(items.map((item) => [keyOf(item), item]));
    for (const [key, row] of rows) {
      if (wanted.has(key)) continue;
      row.element.remove();
      rows.delete(key);
    }
    let place = parent.firstElementChild;
    for (const [key, item] of wanted) {
      if (!rows.has(key)) rows.set(key, make(item));
      const row = rows.get(key);
      row.update(item);
      if (row.element === place) place = place.nextElementSibling;
      else parent.insertBefore(row.element, place);
    }
  };
}
