// Formats of numbers, times and durations.

const LANGUAGE = "en-GB";
const whole = new Intl.NumberFormat(LANGUAGE);
const short = new Intl.NumberFormat(LANGUAGE, { notation: "compact", maximumSignificantDigits: 3 });
const clock = new Intl.DateTimeFormat(LANGUAGE, {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
});
const day = new Intl.DateTimeFormat(LANGUAGE, {
  day: "numeric",
  month: "short",
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
});

const dated = new Intl.DateTimeFormat(LANGUAGE, { day: "numeric", month: "short", year: "numeric", hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const NOTHING = "–";

const given = (value) => value !== null && value !== undefined && !Number.isNaN(value);

/** `12,480` */
export const count = (value) => (given(value) ? whole.format(value) : NOTHING);

/** `400,000 tokens a minute`, from a text with plain numbers */
export const grouped = (text) => text.replace(/\d{4,}/g, (digits) => whole.format(digits));

/** `Explained`, from `explained` */
export const capital = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

/** `1 request`, `12,480 requests` */
export const counted = (value, noun, plural = `${noun}s`, words = count) => `${words(value)} ${value === 1 ? noun : plural}`;

/** `12.5k` from 10,000 on, `2M`: the language's `m` would be read as a thousandth or a minute */
export function brief(value) {
  if (!given(value)) return NOTHING;
  return Math.abs(value) < 10_000 ? whole.format(value) : short.format(value).replace("m", "M");
}

/** A duration in milliseconds: `8 ms`, `1.24 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h` */
export function length(ms) {
  if (!given(ms)) return NOTHING;
  if (ms < 1) return "< 1 ms";
  if (ms < 1_000) return `${Math.round(ms)} ms`;
  if (ms < 10_000) return `${(ms / 1_000).toFixed(2)} s`;
  if (ms < 60_000) return `${(ms / 1_000).toFixed(1)} s`;
  const parts = [
    ["d", 86_400_000],
    ["h", 3_600_000],
    ["min", 60_000],
    ["s", 1_000],
  ];
  const first = parts.findIndex(([, size]) => ms >= size);
  const [large, small] = [parts[first], parts[first + 1]];
  const left = small ? Math.floor((ms % large[1]) / small[1]) : 0;
  const head = `${Math.floor(ms / large[1])} ${large[0]}`;
  return left ? `${head} ${left} ${small[0]}` : head;
}

/** The same with one unit, for narrow places: `3.3 min` */
length.short = (ms) => {
  if (!given(ms) || ms < 60_000) return length(ms);
  if (ms < 3_600_000) return `${(ms / 60_000).toFixed(1)} min`;
  return `${(ms / 3_600_000).toFixed(1)} h`;
};

/** Steps between the marks of an axis: 1, 2 or 5 of a unit, or round parts of an hour or day. */
length.steps = [
  ...[1, 2, 5, 10, 20, 50, 100, 200, 500],
  ...[1, 2, 5, 10, 20, 30].map((s) => s * 1_000),
  ...[1, 2, 5, 10, 20, 30].map((min) => min * 60_000),
  ...[1, 2, 5, 10, 20, 50, 100, 200, 500].map((h) => h * 3_600_000),
];

/** `0.5/s`, `12/s`; below that per minute: `3/min` */
export function rate(perSecond) {
  if (!given(perSecond)) return NOTHING;
  if (perSecond === 0) return "0/s";
  if (perSecond < 1) return `${Number((perSecond * 60).toPrecision(2))}/min`;
  return `${perSecond < 100 ? perSecond.toFixed(1) : brief(Math.round(perSecond))}/s`;
}

/** `42 %`, from a share between 0 and 1 */
export const percent = (share) => (given(share) ? `${Math.round(share * 100)} %` : NOTHING);

export function bytes(value) {
  if (!given(value)) return NOTHING;
  if (value < 1_000) return `${value} B`;
  if (value < 1_000_000) return `${(value / 1_000).toFixed(1)} kB`;
  return `${(value / 1_000_000).toFixed(1)} MB`;
}

/** US dollars, such as `$0.79`; amounts below a cent with two digits. */
export function money(value) {
  if (!given(value)) return NOTHING;
  const amount = Math.abs(value);
  const short = Number(amount.toPrecision(2)); // which may be a whole cent
  const digits = amount && short < 0.01 ? short.toFixed(small(short)) : dollars.format(amount);
  return `${value < 0 ? "-" : ""}$${digits}`;
}

/** The same without cents from $1,000 on, for narrow places: `$1,235`, `$12.3k` */
money.short = (value) => (given(value) && value >= 1_000 ? `$${brief(Math.round(value))}` : money(value));

/** The same for the marks of an axis, with the digits by which they differ. */
money.axis = (marks) => {
  const step = marks.length > 1 ? marks[1] - marks[0] : 1;
  const isWhole = (digits) => Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) < 1e-6;
  const digits = [2, 3, 4, 5, 6].find(isWhole) ?? 6;
  return (value) => (value >= 1_000 ? money.short(value) : `$${value.toFixed(digits)}`);
};

/** A price in dollars, with all of its digits: `$0.075` */
export const price = (value) => (given(value) ? `$${exactly.format(value)}` : NOTHING);

const dollars = new Intl.NumberFormat(LANGUAGE, { minimumFractionDigits: 2, maximumFractionDigits: 2 });
const exactly = new Intl.NumberFormat(LANGUAGE, { minimumFractionDigits: 2, maximumFractionDigits: 6 });
const small = (amount) => Math.min(6, 1 - Math.floor(Math.log10(amount)));

const date = (value) => (value instanceof Date ? value : new Date(value));
const isToday = (at) => at.toDateString() === new Date().toDateString();

/**
 * `14:03:09` today, `24 Nov, 14:03:09` on other days of this year, `24 Nov 2025, 14:03:09`
 * otherwise
 */
export function time(value) {
  if (!given(value)) return NOTHING;
  const at = date(value);
  if (isToday(at)) return clock.format(at);
  return (at.getFullYear() === new Date().getFullYear() ? day : dated).format(at);
}

/** `12 s ago` */
export function ago(value, now = Date.now()) {
  if (!given(value)) return NOTHING;
  const ms = now - date(value).getTime();
  if (ms < 1_000) return "now";
  return ms < 60_000 ? `${Math.floor(ms / 1_000)} s ago` : `${length(ms)} ago`;
}
