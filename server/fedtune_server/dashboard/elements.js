// What the page is made of: elements, times and tables. Text goes in as text, never as markup, so
// a site's name or a log line cannot become part of the page.

const MARKS = { good: "●", busy: "▶", bad: "✕", off: "○" };

function add(parent, children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== "") parent.append(child);
  }
  return parent;
}

export function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return add(made, children);
}

export function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return add(made, children);
}

export const by = (id) => document.getElementById(id);

// New content for a box; who reads or scrolls in it stays where they were.
export function fill(id, ...children) {
  const box = by(id);
  const stops = () => [...box.querySelectorAll("a, summary, [tabindex]")];
  const at = stops().indexOf(document.activeElement);
  const down = box.querySelector("[tabindex]")?.scrollTop || 0;
  box.replaceChildren();
  add(box, children);
  if (at >= 0) stops()[at]?.focus({ preventScroll: true });
  if (down) box.querySelector("[tabindex]")?.scrollTo(0, down);
}

export const small = (text) => (text ? el("small", {}, text) : "");
export const nothing = (text) => el("p", { class: "soft" }, text);

export function marked(mark, text) {
  const sign = el("span", { class: "mark", "aria-hidden": "true" }, MARKS[mark]);
  return el("span", { class: mark }, sign, text);
}

// ---------------------------------------------------------------- times

let clockOffsetMs = 0;

export const serverNow = () => Date.now() + clockOffsetMs;

// The server's clock counts, not the reader's.
export function setClock(iso) {
  clockOffsetMs = Date.parse(iso) - Date.now();
}

export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 100) return `${minutes} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

export function agoText(iso) {
  const then = Date.parse(iso);
  if (Number.isNaN(then)) return "";
  const seconds = (serverNow() - then) / 1000;
  return seconds < 5 ? "now" : `${duration(seconds)} ago`;
}

export function ago(iso) {
  return iso ? el("time", { datetime: iso, class: "ago", title: iso }, agoText(iso)) : "never";
}

export function clock(iso) {
  const day = iso.slice(0, 10);
  const today = new Date(serverNow()).toISOString().slice(0, 10);
  const text = day === today ? iso.slice(11, 19) : `${day} ${iso.slice(11, 16)}`;
  return iso ? el("time", { datetime: iso, title: iso }, text) : "";
}

// ---------------------------------------------------------------- tables

// Rows are lists of cells; the first is the row's header. Roles are said because a table that is
// laid out as cards on a phone would lose them.
export function table(caption, head, rows) {
  const body = el("tbody", { role: "rowgroup" });
  for (const cells of rows) body.append(row(head, cells));
  const names = head.map((name) => el("th", { scope: "col", role: "columnheader" }, name));
  const top = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, names));
  return el("table", { class: "cards", role: "table" }, el("caption", {}, caption), top, body);
}

export function row(head, cells) {
  const made = el("tr", { role: "row" });
  cells.forEach((cell, index) => {
    const inside = Array.isArray(cell) ? cell : [cell];
    const box = el("div", {}, inside);
    made.append(index === 0
      ? el("th", { scope: "row", role: "rowheader" }, box)
      : el("td", { role: "cell", "data-label": head[index] }, box));
  });
  return made;
}

export function tall(label, rows, content) {
  if (rows <= 12) return content;
  return el("div", { class: "tall", tabindex: "0", role: "region", "aria-label": label }, content);
}
