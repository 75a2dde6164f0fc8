// Export of the content of a page as a file, written in the browser.

import { h } from "./dom.js";

// The start of a cell, also in spreadsheets of locales that separate cells by semicolons.
const FORMULAS = /(^|[;\t\r\n])(?=[=+\-@＝＋－＠\t\r])/g;

/** Escape a text that a spreadsheet would run as a formula, since tenants choose names. */
export function csv(columns, rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    const text = typeof value === "string" ? value.replace(FORMULAS, "$1'") : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const line = (cells) => `${cells.map(cell).join(",")}\r\n`;
  return line(columns) + rows.map((row) => line(columns.map((name) => row[name]))).join("");
}

export const jsonLines = (rows) => rows.map((row) => `${JSON.stringify(row)}\n`).join("");

/** Download a text as a file. */
export function save(name, kind, text) {
  const type = kind === "csv" ? "text/csv" : "application/x-ndjson";
  const at = new Date().toISOString().slice(0, 19).replaceAll(":", "");
  saveBlob(`${name}-${at}.${kind}`, new Blob([text], { type }));
}

export function saveBlob(file, blob) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
