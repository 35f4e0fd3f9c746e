// The board: takes what the coordinator sends and puts it on the page. Text goes in as text, never
// as markup, so a site's name or a log line cannot become part of the page.
"use strict";

const SILENCE_MS = 45000;
const MARKS = { good: "●", busy: "▶", bad: "✕", off: "○" };
const RUN_MARKS = {
  queued: "off", running: "busy", stopping: "busy", stopped: "off", finished: "good", failed: "bad",
};
const SPAN_WORDS = {
  "at work": ["work", "at work"],
  reported: ["reported", "reported"],
  refused: ["refused", "refused"],
  late: ["late", "late: the round closed without it"],
  "cut off": ["work", "cut off: the run ended before"],
  "joined late": ["reported", "an earlier round's work, joined now"],
};

const parts = {};
let clockOffsetMs = 0;
let heardAt = Date.now();
let source = null;

// ---------------------------------------------------------------- elements

function add(parent, children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== "") parent.append(child);
  }
  return parent;
}

function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return add(made, children);
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  return add(made, children);
}

const by = (id) => document.getElementById(id);

// New content for a box; who reads or scrolls in it stays where they were.
function fill(id, ...children) {
  const box = by(id);
  const stops = () => [...box.querySelectorAll("a, summary, [tabindex]")];
  const at = stops().indexOf(document.activeElement);
  const down = box.querySelector("[tabindex]")?.scrollTop || 0;
  box.replaceChildren();
  add(box, children);
  if (at >= 0) stops()[at]?.focus({ preventScroll: true });
  if (down) box.querySelector("[tabindex]")?.scrollTo(0, down);
}

const small = (text) => (text ? el("small", {}, text) : "");
const nothing = (text) => el("p", { class: "soft" }, text);

function marked(mark, text) {
  const sign = el("span", { class: "mark", "aria-hidden": "true" }, MARKS[mark]);
  return el("span", { class: mark }, sign, text);
}

// ---------------------------------------------------------------- times

const serverNow = () => Date.now() + clockOffsetMs;

function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 100) return `${minutes} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

function agoText(iso) {
  const then = Date.parse(iso);
  if (Number.isNaN(then)) return "";
  const seconds = (serverNow() - then) / 1000;
  return seconds < 5 ? "now" : `${duration(seconds)} ago`;
}

function ago(iso) {
  return iso ? el("time", { datetime: iso, class: "ago", title: iso }, agoText(iso)) : "never";
}

function clock(iso) {
  const day = iso.slice(0, 10);
  const today = new Date(serverNow()).toISOString().slice(0, 10);
  const text = day === today ? iso.slice(11, 19) : `${day} ${iso.slice(11, 16)}`;
  return iso ? el("time", { datetime: iso, title: iso }, text) : "";
}

// ---------------------------------------------------------------- tables

// Rows are lists of cells; the first is the row's header. Roles are said because a table that is
// laid out as cards on a phone would lose them.
function table(caption, head, rows) {
  const body = el("tbody", { role: "rowgroup" });
  for (const cells of rows) body.append(row(head, cells));
  const names = head.map((name) => el("th", { scope: "col", role: "columnheader" }, name));
  const top = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, names));
  return el("table", { class: "cards", role: "table" }, el("caption", {}, caption), top, body);
}

function row(head, cells) {
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

function tall(label, rows, content) {
  if (rows <= 12) return content;
  return el("div", { class: "tall", tabindex: "0", role: "region", "aria-label": label }, content);
}

// ---------------------------------------------------------------- the run

function drawHead(head) {
  by("run-name").textContent = head.name || "no run yet";
  document.title = head.name ? `${head.name} ${head.state}, fedtune` : "fedtune";
  const chip = by("run-state");
  chip.className = `chip ${RUN_MARKS[head.state] || "off"}`;
  chip.textContent = head.state || "";
  by("run-reason").hidden = !head.reason;
  by("run-reason").textContent = head.reason || "";
  by("h-summary").parentElement.hidden = !head.name;
  if (!head.name) return;
  const figure = (name, value, note) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value, small(note)));
  fill("figures",
    figure("Rounds", `${head.round} of ${head.rounds}`, head.left !== "–" ? `about ${head.left} left` : ""),
    figure("Held-out loss", head.loss_now !== "–" ? head.loss_now : head.loss_before, `${head.loss_before} at first`),
    figure("A round takes", head.pace, "mean of the last five"),
    figure("Sent to sites", head.sent, `${head.received} back`),
    figure("Restarts", String(head.restarts), ""),
    el("div", {}, el("dt", {}, "Last written"), el("dd", {}, ago(head.updated))));
}

function drawRuns(runs) {
  if (!runs.length) return fill("runs", nothing("No run was asked for. Start one with: fedtune run RUN.toml"));
  const head = ["Run", "State", "Rounds", "Sites", "Sent / back", "Restarts", "Last written", "Reason"];
  const rows = runs.map((run) => {
    const link = el("a", { href: `/?run=${encodeURIComponent(run.name)}` }, run.name);
    if (parts.head && parts.head.name === run.name) link.setAttribute("aria-current", "true");
    return [
      link, marked(RUN_MARKS[run.state] || "off", run.state), `${run.round} of ${run.rounds}`,
      String(run.sites), `${run.sent} / ${run.received}`, String(run.restarts), ago(run.updated),
      run.reason || "–",
    ];
  });
  return fill("runs", tall("Runs", rows.length, table("A run's name shows it on this page", head, rows)));
}

function drawAlarms(alarms) {
  if (!alarms.length) return fill("alarm-list", nothing("None."));
  const items = alarms.map((alarm) => {
    const when = alarm.time ? el("time", { datetime: alarm.time, class: "ago" }, agoText(alarm.time)) : "";
    return el("li", {}, el("b", {}, alarm.name), alarm.text, when);
  });
  return fill("alarm-list", el("ul", { class: "alarms", tabindex: "0", "aria-label": "Alarms" }, items));
}

// ---------------------------------------------------------------- the fleet

const FLEET = ["Site", "State", "Device", "Plan", "Last seen", "Bytes down / up", "Memory", "Link down / up"];

function gauge(site) {
  if (site.used_share === null && site.predicted_share === null) return "";
  const made = svg("svg", { class: "gauge", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "room", width: 100, height: 8, rx: 1 }));
  const share = (value) => Math.min(Math.max(value, 0), 1) * 100;
  if (site.used_share !== null) made.append(svg("rect", { class: "used", width: share(site.used_share), height: 8, rx: 1 }));
  if (site.predicted_share !== null) {
    made.append(svg("rect", { class: "predicted", x: Math.min(share(site.predicted_share), 98), width: 2, height: 8 }));
  }
  return made;
}

function siteRow(name) {
  const site = parts[`site/${name}`];
  const steps = site.steps ? `, step ${site.step} of ${site.steps}` : "";
  const work = site.round ? `${site.online ? "" : "last told: "}round ${site.round}${steps}` : "";
  const bounds = [[site.predicted, "planned"], [site.allowed, "allowed"]]
    .filter(([value]) => value !== "–").map((pair) => pair.join(" ")).join(", ");
  const memory = [site.used === "–" ? "–" : `${site.used} used`, small(bounds), gauge(site)];
  const made = row(FLEET, [
    site.site,
    [marked(site.mark, site.state), small(work), small(site.excluded || site.refusal)],
    [site.device, small(site.class)],
    site.plan,
    ago(site.last_seen),
    [`${site.down} / ${site.up}`, small(`today ${site.down_today} / ${site.up_today}`)],
    memory,
    `${site.link_down} / ${site.link_up}`,
  ]);
  made.dataset.site = name;
  return made;
}

function drawFleet() {
  const order = parts.fleet.order;
  if (!order.length) return fill("fleet", nothing("No site is registered. Invite one with: fedtune server invite SITE"));
  const online = order.filter((name) => parts[`site/${name}`].online).length;
  const made = table(`${online} of ${order.length} online`, FLEET, []);
  made.tBodies[0].append(...order.map(siteRow));
  return fill("fleet", tall("Sites", order.length, made));
}

function drawSite(name, was) {
  const old = [...by("fleet").querySelectorAll("tr")].find((each) => each.dataset.site === name);
  if (!old) return;
  const made = siteRow(name);
  if (was && was.state !== parts[`site/${name}`].state) made.classList.add("changed");
  old.replaceWith(made);
  const order = parts.fleet.order;
  const online = order.filter((each) => parts[`site/${each}`].online).length;
  by("fleet").querySelector("caption").textContent = `${online} of ${order.length} online`;
}

// ---------------------------------------------------------------- the losses

function drawLoss(loss) {
  if (!loss.held_out.length && !loss.train.length) return fill("loss", nothing("No round was joined yet."));
  const lines = [["held-out", "held", loss.held_out], ["training", "train", loss.train]].filter((line) => line[2].length);
  const open = by("loss").querySelector("details")?.open || false;
  const numbers = el("details", {}, el("summary", {}, "The numbers"), lossTable(loss));
  numbers.open = open;
  return fill("loss", el("ul", { class: "legend" }, lines.map(legendItem)), lossChart(loss, lines), numbers);
}

function legendItem([name, style]) {
  const sample = svg("svg", { width: 28, height: 10, "aria-hidden": "true" },
    svg("path", { class: `line ${style}`, d: "M0 5H28" }), svg("circle", { class: `${style}-dot`, cx: 14, cy: 5, r: 3 }));
  return el("li", {}, sample, name);
}

function lossChart(loss, lines) {
  const width = Math.max(240, by("loss").clientWidth), height = 250;
  const left = 46, right = 10, top = 10, bottom = 36;
  const points = lines.flatMap((line) => line[2]);
  const xs = points.map((point) => point[0]);
  const lowX = Math.min(...xs), spanX = Math.max(...xs) - lowX || 1;
  const lowY = loss.y_ticks[0], spanY = loss.y_ticks.at(-1) - lowY || 1;
  const x = (value) => left + 6 + ((value - lowX) / spanX) * (width - left - right - 12);
  const y = (value) => top + (1 - (value - lowY) / spanY) * (height - top - bottom);
  const last = lines.map(([name, , of]) => `${name} ${of.at(-1)[1].toFixed(4)}`).join(", ");
  const made = svg("svg", { width, height, role: "img", "aria-label": `Loss per round; last: ${last}. The numbers are in the table below.` });
  for (const tick of loss.y_ticks) {
    made.append(svg("path", { class: "grid", d: `M${left} ${y(tick)}H${width - right}` }),
      svg("text", { class: "soft", x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(Number(tick.toPrecision(6)))));
  }
  for (const tick of loss.x_ticks) {
    made.append(svg("text", { class: "soft", x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, String(tick)));
  }
  made.append(svg("text", { class: "soft", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "round"));
  for (const [name, style, of] of lines) {
    made.append(svg("polyline", { class: `line ${style}`, points: of.map((p) => `${x(p[0])},${y(p[1])}`).join(" ") }));
    if (of.length <= 60) {
      for (const p of of) {
        made.append(svg("circle", { class: `${style}-dot`, cx: x(p[0]), cy: y(p[1]), r: 3 },
          svg("title", {}, `${name}, round ${p[0]}: ${p[1].toFixed(4)}`)));
      }
    }
  }
  return made;
}

function lossTable(loss) {
  const held = new Map(loss.held_out), train = new Map(loss.train);
  const rounds = [...new Set([...held.keys(), ...train.keys()])].sort((a, b) => b - a);
  const text = (value) => (value === undefined ? "–" : value.toFixed(4));
  const rows = rounds.map((round) => [String(round), text(held.get(round)), text(train.get(round))]);
  const made = table("Held-out loss is of the joined adapter after a round", ["Round", "Held-out", "Training"], rows);
  made.classList.remove("cards");
  return tall("Loss per round", rows.length, made);
}

// ---------------------------------------------------------------- the round

function drawRound() {
  const round = parts.round;
  if (!round.round) return fill("round", nothing("No round has begun yet."));
  const open = by("round").querySelector("details")?.open || false;
  by("h-round").textContent = `${round.over ? "Last" : "Current"} round: ${round.round}`;
  const words = round.closed_s !== null ? `joined after ${duration(round.closed_s)}` : round.over ? "not joined" : "going on";
  const again = round.attempt > 1 ? `, attempt ${round.attempt}` : "";
  const numbers = el("details", {}, el("summary", {}, "The numbers"), roundTable(round));
  numbers.open = open;
  return fill("round", el("p", { class: "soft" }, "Begun at ", clock(round.started), `, ${words}${again}`),
    tall("Time line of the round", round.spans.length, roundChart(round)), numbers);
}

function roundNow(round) {
  return round.over ? round.last_s : Math.max(round.last_s, (serverNow() - Date.parse(round.started)) / 1000);
}

function roundChart(round) {
  const width = Math.max(240, by("round").clientWidth - 14);
  const now = roundNow(round);
  const planned = round.spans.map((span) => (span.planned_s || 0) + span.start_s);
  const end = Math.max(now, Math.min(Math.max(...planned, 0), now * 3), 0.001);
  const line = 40, top = 4, height = top + round.spans.length * line + 22;
  const x = (s) => 1 + (s / end) * (width - 2);
  const made = svg("svg", { width, height, role: "img", "aria-label": `Time line of round ${round.round}; the numbers are in the table below.` });
  made.append(svg("defs", {}, svg("pattern", { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    svg("path", { class: "hatch", d: "M0 0V7" }))));
  round.spans.forEach((span, index) => {
    const [style, word] = SPAN_WORDS[span.outcome];
    const y = top + index * line, until = span.end_s === null ? now : span.end_s;
    const clipped = span.device.length > 28 ? `${span.device.slice(0, 27)}…` : span.device;
    const shortWord = width < 420 ? word.split(":")[0] : word;
    made.append(
      svg("text", { x: 0, y: y + 13 }, clipped),
      svg("text", { class: "soft", x: width, y: y + 13, "text-anchor": "end" }, `${shortWord}, ${duration(until - span.start_s)}`),
      svg("rect", { class: `bar ${style}`, x: x(span.start_s), y: y + 19, width: Math.max(x(until) - x(span.start_s), 2), height: 11, rx: 2 },
        svg("title", {}, `${span.device}: ${word}${span.note ? `: ${span.note}` : ""}`)));
    if (style === "refused") made.append(svg("text", { x: Math.min(x(until) + 4, width - 12), y: y + 29 }, "✕"));
    const due = span.planned_s ? span.start_s + span.planned_s : null;
    if (due !== null && due <= end) made.append(svg("path", { class: "planned", d: `M${x(due)} ${y + 16}v17` }, svg("title", {}, "planned end")));
  });
  const y = height - 6;
  made.append(svg("text", { class: "soft", x: 0, y }, "0 s"), svg("text", { class: "soft", x: width, y, "text-anchor": "end" }, duration(end)));
  if (planned.some((s) => s > 0 && s <= end)) made.append(svg("text", { class: "soft", x: width / 2, y, "text-anchor": "middle" }, "| planned end"));
  return made;
}

function roundTable(round) {
  const head = ["Site", "What came of it", "Sent after", "Took", "Planned"];
  const text = (value) => (value === null ? "–" : duration(value));
  const rows = round.spans.map((span) => [
    span.device, [SPAN_WORDS[span.outcome][1], small(span.note)], text(span.start_s),
    span.end_s === null ? "–" : duration(span.end_s - span.start_s), text(span.planned_s),
  ]);
  return tall("The round in numbers", rows.length, table("Seconds since the round began", head, rows));
}

// ---------------------------------------------------------------- what was refused, spent, written

function drawRefusals(refusals) {
  if (!refusals.length) return fill("refusals", nothing("None."));
  const rows = refusals.map((each) => [each.who, each.what, each.reason, clock(each.time)]);
  return fill("refusals", tall("Refusals", rows.length, table("The newest first", ["Who", "What", "Why", "When"], rows)));
}

function drawPrivacy(spent) {
  if (!spent.length) return fill("privacy", nothing("None: no event of this run names an epsilon."));
  const rows = spent.map((each) => [each.who, each.epsilon, each.budget, each.delta]);
  return fill("privacy", table("Spent so far", ["Who", "Epsilon", "Of", "Delta"], rows));
}

function drawLedger(lines) {
  if (!lines.length) return fill("ledger", nothing("No event yet."));
  const rows = lines.map((line) => [line.kind, line.text, clock(line.time)]);
  return fill("ledger", tall("Last events", rows.length, table("The newest first", ["Event", "What it says", "When"], rows)));
}

// ---------------------------------------------------------------- what changes

const DRAW = {
  head: () => { drawHead(parts.head); if (parts.runs) drawRuns(parts.runs.runs); },
  runs: () => drawRuns(parts.runs.runs),
  alarms: () => drawAlarms(parts.alarms.alarms),
  fleet: drawFleet,
  loss: () => drawLoss(parts.loss),
  round: drawRound,
  refusals: () => drawRefusals(parts.refusals.refusals),
  privacy: () => drawPrivacy(parts.privacy.spent),
  ledger: () => drawLedger(parts.ledger.lines),
};

// What a person who does not see the page should hear; never more than one sentence per cause.
function toSay(before, whole) {
  const said = [], head = parts.head;
  if (head && head.name && (whole || !before.head || before.head.state !== head.state || before.head.round !== head.round)) {
    said.push(`Run ${head.name} ${head.state}, round ${head.round} of ${head.rounds} joined.`);
  }
  const known = new Set((before.alarms?.alarms || []).map((alarm) => alarm.text));
  const fresh = (parts.alarms?.alarms || []).filter((alarm) => !known.has(alarm.text));
  if (fresh.length > 2) said.push(`${fresh.length} new alarms.`);
  else for (const alarm of fresh) said.push(`Alarm: ${alarm.text}.`);
  if (!whole) {
    for (const name of parts.fleet?.order || []) {
      const was = before[`site/${name}`], is = parts[`site/${name}`];
      if (was && (was.mark === "bad") !== (is.mark === "bad")) said.push(`Site ${name}: ${is.state}.`);
    }
  }
  return said.slice(0, 4).join(" ");
}

function take(change) {
  clockOffsetMs = Date.parse(change.time) - Date.now();
  const before = { ...parts };
  if (change.whole) for (const name of Object.keys(parts)) delete parts[name];
  Object.assign(parts, change.parts);
  const changed = Object.keys(change.parts);
  for (const name of Object.keys(DRAW)) if (changed.includes(name)) DRAW[name]();
  if (!changed.includes("fleet")) {
    for (const name of changed) if (name.startsWith("site/")) drawSite(name.slice(5), before[name]);
  }
  const said = toSay(before, change.whole);
  if (said) by("announce").textContent = said;
}

// ---------------------------------------------------------------- the connection

function connected(text) {
  if (by("connection").textContent !== text) by("connection").textContent = text;
}

function connect() {
  heardAt = Date.now();
  source = new EventSource(`/events${location.search}`);
  source.addEventListener("open", () => connected("Live"));
  source.addEventListener("change", (event) => {
    heardAt = Date.now();
    connected("Live");
    take(JSON.parse(event.data));
  });
  source.addEventListener("beat", () => { heardAt = Date.now(); });
  source.addEventListener("ended", () => location.reload());
  source.addEventListener("error", () => {
    connected("Connection lost, trying again");
    by("announce").textContent = "Connection lost, trying again.";
    // Refused, and not just unreachable: the session may be over, which the page itself tells.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => location.reload(), 10000);
  });
}

function tick() {
  for (const time of document.querySelectorAll("time.ago")) {
    const text = agoText(time.getAttribute("datetime"));
    if (time.textContent !== text) time.textContent = text;
  }
  const picture = by("round").querySelector("svg");
  if (picture && !parts.round.over) picture.replaceWith(roundChart(parts.round));
  if (source.readyState !== EventSource.CLOSED && Date.now() - heardAt > SILENCE_MS) {
    source.close();
    connect();
  }
}

if (document.body.classList.contains("board")) {
  connect();
  setInterval(tick, 2000);
  let width = 0;
  new ResizeObserver(() => {
    if (by("loss").clientWidth === width) return;
    width = by("loss").clientWidth;
    if (parts.loss) drawLoss(parts.loss);
    if (parts.round) drawRound();
  }).observe(by("board"));
} else {
  by("token").focus();
}
