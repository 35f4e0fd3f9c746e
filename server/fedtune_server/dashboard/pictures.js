// The two pictures, each with its numbers in a table below it.

import { by, clock, duration, el, fill, nothing, serverNow, small, svg, table, tall } from "./elements.js";

const SPAN_WORDS = {
  "at work": ["work", "at work"],
  reported: ["reported", "reported"],
  refused: ["refused", "refused"],
  late: ["late", "late: the round closed without it"],
  "cut off": ["work", "cut off: the run ended before"],
  "joined late": ["reported", "an earlier round's work, joined now"],
};

// ---------------------------------------------------------------- the losses

export function drawLoss(loss) {
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

export function drawRound(round) {
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

export function roundChart(round) {
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
