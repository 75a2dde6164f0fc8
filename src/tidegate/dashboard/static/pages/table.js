// Every page, in the order of the navigation.
//
// path: parts that begin with ":" are handed to the page as `params`. nav: the words in the
// navigation; without them the page is reached from another one. key: after a g, it opens the page. style: a stylesheet in this folder,
// or several, worn while the page is open. load: the module, which exports
// `open(main, { params, query, signal })`: it fills `main` and returns when the first view is there;
// `signal` is aborted when the page is left. A Problem that it throws is shown in its place.

export const PAGES = [
  {
    path: "/",
    title: "Overview",
    nav: "Overview",
    key: "o",
    style: ["overview.css", "overview/limits.css"],
    load: () => import("./overview.js"),
  },
  {
    path: "/requests",
    title: "Requests",
    nav: "Requests",
    key: "r",
    style: ["requests.css", "request.css", "timeline.css"],
    load: () => import("./requests.js"),
  },
  {
    path: "/requests/conversation",
    title: "Conversation",
    style: ["overview.css", "requests.css", "conversation.css"],
    load: () => import("./conversation.js"),
  },
  {
    path: "/requests/:id",
    title: "Request",
    style: ["request.css", "timeline.css"],
    load: () => import("./request.js"),
  },
  {
    path: "/batches",
    title: "Batches",
    nav: "Batches",
    key: "b",
    style: "batches.css",
    load: () => import("./batches.js"),
  },
  {
    path: "/usage",
    title: "Usage",
    nav: "Usage",
    key: "u",
    style: ["overview.css", "listed.css", "usage.css"],
    load: () => import("./usage.js"),
  },
  {
    path: "/upstreams",
    title: "Upstreams",
    nav: "Upstreams",
    key: "p",
    style: "upstreams.css",
    load: () => import("./upstreams.js"),
  },
  {
    path: "/tenants",
    title: "Keys and tenants",
    nav: "Keys",
    key: "k",
    style: ["listed.css", "tenants.css"],
    load: () => import("./tenants.js"),
  },
  {
    path: "/actions",
    title: "What operators did",
    key: "w",
    style: "listed.css",
    load: () => import("./actions.js"),
  },
  {
    path: "/limits/history",
    title: "Changes of limits",
    key: "h",
    style: "revisions.css",
    load: () => import("./revisions.js"),
  },
  {
    path: "/what-if",
    title: "What if",
    nav: "What if",
    key: "i",
    style: ["overview.css", "listed.css", "what_if.css"],
    load: () => import("./what_if.js"),
  },
  {
    path: "/attention",
    title: "Attention",
    nav: "Attention",
    key: "a",
    load: () => import("./attention.js"),
  },
  {
    path: "/alerts",
    title: "Alerts",
    nav: "Alerts",
    key: "l",
    style: ["listed.css", "alerts.css"],
    load: () => import("./alerts.js"),
  },
  {
    path: "/settings",
    title: "Settings",
    nav: "Settings",
    key: "s",
    style: "settings.css",
    load: () => import("./settings.js"),
  },
  {
    path: "/try",
    title: "Try it",
    nav: "Try it",
    key: "t",
    style: ["requests.css", "request.css", "try.css"],
    load: () => import("./try.js"),
  },
];
