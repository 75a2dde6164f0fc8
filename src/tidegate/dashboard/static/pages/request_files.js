// Images and files of requests: fetched with the key, shown as images or downloaded.

import { ask, fileUrl, Problem } from "../api.js";
import { h } from "../dom.js";
import { bytes } from "../format.js";
import { said, toast } from "../ui.js";

const PICTURES = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]);
const KEPT_MS = 10_000;

/** The files of one page. An image is fetched once; its object URL is revoked with the page. */
export class Files {
  #signal;
  #urls = new Map();

  constructor(signal) {
    this.#signal = signal;
    signal.addEventListener("abort", async () => {
      for (const url of await Promise.allSettled(this.#urls.values())) {
        if (url.status === "fulfilled") URL.revokeObjectURL(url.value);
      }
    });
  }

  /** Return the object URL of an image. Rejects with a Problem. */
  picture(path) {
    if (!this.#urls.has(path)) this.#urls.set(path, fileUrl(path, { signal: this.#signal }));
    return this.#urls.get(path);
  }

  /** Download a file as `name`. */
  async keep(path, name) {
    try {
      const response = await ask("GET", path, { signal: this.#signal, headers: { Accept: "*/*" } });
      save(await response.blob(), name);
    } catch (error) {
      if (this.#signal.aborted) return;
      if (!(error instanceof Problem)) throw error;
      toast(said(error), "bad");
    }
  }
}

/**
 * Save a blob, never with the sender's content type, so that no browser opens it as a page of this
 * origin.
 */
export function save(blob, name) {
  const url = URL.createObjectURL(new Blob([blob], { type: "application/octet-stream" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), KEPT_MS);
}

export function gallery(list, files) {
  if (!list || list.length === 0) return null;
  return h("ul", { class: "gallery" }, list.map((one) => h("li", {}, shownFile(one, files))));
}

/** Show an image, or the name of any other file. */
export function shownFile(file, files) {
  const isPicture = PICTURES.has(file.mime_type);
  const name = file.name || (isPicture ? "Picture" : "File");
  const keep = h("button", { class: "button small", type: "button" }, "Download");
  keep.addEventListener("click", () => files.keep(file.url, file.name || nameOf(file)));
  const caption = h(
    "figcaption",
    {},
    h("span", { class: "wrap" }, name),
    h("span", { class: "quiet-text" }, `${file.mime_type}, ${bytes(file.size_bytes)}`),
    keep,
  );
  const figure = h("figure", { class: "shown-file" }, caption);
  if (isPicture) {
    files.picture(file.url).then(
      (url) => figure.prepend(h("img", { src: url, alt: name })),
      (error) => error instanceof Problem && caption.append(h("span", { class: "wrong" }, said(error))),
    );
  }
  return figure;
}

const nameOf = (file) => `${file.url.split("/").pop()}.${file.mime_type.split("/")[1]}`;
