// All pages, in the order of the navigation.
//
// path: parts that begin with ":" are passed to the page as `params`. nav: the text in the
// navigation; pages without it are reached from other pages. key: opens the page after a g. style:
// one or several stylesheets in this folder, enabled while the page is open. load: imports the
// module, which exports `open(main, { params, query, signal })`. It fills `main` and returns when
// the first view is shown; `signal` is aborted when the page is left. A Problem that it throws is
// shown in place of the page.

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
    path: "/latency",
    title: "Latency",
    key: "d",
    style: ["overview.css", "listed.css", "usage.css"],
    load: () => import("./latency.js"),
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
    nav: "Keys and tenants",
    key: "k",
    style: ["listed.css", "tenants.css"],
    load: () => import("./tenants.js"),
  },
  {
    path: "/actions",
    title: "Operator actions",
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
    style: "listed.css",
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
    title: "Playground",
    nav: "Playground",
    key: "t",
    style: ["requests.css", "request.css", "try.css"],
    load: () => import("./try.js"),
  },
];
