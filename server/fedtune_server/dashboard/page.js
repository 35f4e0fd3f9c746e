// The board: takes what the coordinator sends and puts it on the page.

import { ago, agoText, by, clock, el, fill, marked, nothing, setClock, small, table, tall } from "./elements.js";
import { drawFleet, drawSite } from "./fleet.js";
import { drawLoss, drawRound, roundChart } from "./pictures.js";

const SILENCE_MS = 45000;
const RUN_MARKS = {
  queued: "off", running: "busy", stopping: "busy", stopped: "off", finished: "good", failed: "bad",
};

const parts = {};
let heardAt = Date.now();
let source = null;

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
  fleet: () => drawFleet(parts),
  loss: () => drawLoss(parts.loss),
  round: () => drawRound(parts.round),
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
  setClock(change.time);
  const before = { ...parts };
  if (change.whole) for (const name of Object.keys(parts)) delete parts[name];
  Object.assign(parts, change.parts);
  const changed = Object.keys(change.parts);
  for (const name of Object.keys(DRAW)) if (changed.includes(name)) DRAW[name]();
  if (!changed.includes("fleet")) {
    for (const name of changed) if (name.startsWith("site/")) drawSite(parts, name.slice(5), before[name]);
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
    if (parts.round) drawRound(parts.round);
  }).observe(by("board"));
} else {
  by("token").focus();
}
