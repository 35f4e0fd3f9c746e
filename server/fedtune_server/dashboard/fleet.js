// The table of sites, a row of which is replaced when that site changes.

import { ago, by, el, fill, marked, nothing, row, small, svg, table, tall } from "./elements.js";

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

function siteRow(site) {
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
  made.dataset.site = site.site;
  return made;
}

function howMany(parts) {
  const order = parts.fleet.order;
  return `${order.filter((name) => parts[`site/${name}`].online).length} of ${order.length} online`;
}

export function drawFleet(parts) {
  const order = parts.fleet.order;
  if (!order.length) return fill("fleet", nothing("No site is registered. Invite one with: fedtune server invite SITE"));
  const made = table(howMany(parts), FLEET, []);
  made.tBodies[0].append(...order.map((name) => siteRow(parts[`site/${name}`])));
  return fill("fleet", tall("Sites", order.length, made));
}

export function drawSite(parts, name, was) {
  const old = [...by("fleet").querySelectorAll("tr")].find((each) => each.dataset.site === name);
  if (!old) return;
  const made = siteRow(parts[`site/${name}`]);
  if (was && was.state !== parts[`site/${name}`].state) made.classList.add("changed");
  old.replaceWith(made);
  by("fleet").querySelector("caption").textContent = howMany(parts);
}
