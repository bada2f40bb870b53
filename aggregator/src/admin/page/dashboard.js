// Asks /api/v1 with the operator's token and shows the answers. Everything from there is put in as text, never as markup.
"use strict";

const PHASES = ["waiting", "collecting", "merging", "aligning", "evaluating", "publishing"];
const LOOK_MS = 2000;
const PAGE = 50;
const KEY = "commonweal-admin-token";
const $ = (id) => document.getElementById(id);

let token = null;
let timer = null;
let lastEvent = 0;
let events = [];
let seen = "";
let lists = { rounds: [], releases: [], devices: [] };

function element(name, text, classes) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (classes) made.className = classes;
  return made;
}
const percent = (rate) => (rate === null || rate === undefined ? "–" : (100 * rate).toFixed(1) + " %");
const number = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const moment = (ms) => (ms ? new Date(ms).toLocaleString() : "–");
const words = (name) => name.replaceAll("_", " ");
function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) { bytes /= 1000; unit += 1; }
  return (unit ? bytes.toFixed(1) : bytes) + " " + units[unit];
}
function ago(ms, now) {
  if (!ms) return "not since the start";
  const seconds = Math.max(0, Math.round((now - ms) / 1000));
  if (seconds < 90) return seconds + " s ago";
  if (seconds < 5400) return Math.round(seconds / 60) + " min ago";
  return seconds < 172800 ? Math.round(seconds / 3600) + " h ago" : Math.round(seconds / 86400) + " days ago";
}

async function ask(path) {
  const answer = await fetch("/api/v1/" + path, { headers: { Authorization: "Bearer " + token }, cache: "no-store" });
  if (answer.status === 401) throw new Refused();
  if (!answer.ok) throw new Error((await answer.text()).trim() || "status " + answer.status);
  return answer.json();
}
class Refused extends Error {}

function fill(body, rows) {
  body.replaceChildren(...rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((cell) => (cell instanceof Node ? cell : element("td", cell))));
    return row;
  }));
}
const table = (id) => $(id).tBodies[0];

function showNow(now) {
  const round = now.round;
  $("phases").replaceChildren(...PHASES.map((phase) => {
    const item = element("li", phase);
    if (phase === round.phase) item.setAttribute("aria-current", "step");
    return item;
  }));
  const collecting = round.phase === "collecting";
  $("progress-text").textContent = collecting
    ? `Round ${round.round}: ${round.received} of ${round.target} updates, ${round.selected} devices have a task`
    : `Round ${round.round}: ${round.phase}`;
  $("progress").hidden = !collecting;
  if (collecting) { $("progress").max = round.target || 1; $("progress").value = round.received; }
  const release = now.release, card = release && release.report_card;
  const tiles = [
    ["Release", release ? String(release.version) : "none"],
    ["Published", release ? ago(release.created_ms, now.now_ms) : "–"],
    ["Safe answers", percent(card && card.safe_rate)],
    ["Held-out loss", number(card && card.held_out_loss, 4)],
    ["Devices online", `${now.devices.online} of ${now.devices.active}`],
    ["With this release", String(now.devices.current)],
    ["Revoked, expired", `${now.devices.revoked}, ${now.devices.expired}`],
    ["Open invitations", String(now.invitations_open)],
    ["Connections", String(now.connections_open)],
    ["Disk used", size(now.store.database_bytes + now.store.blobs_bytes + now.store.partials_bytes)],
    ["Disk free", now.store.free_bytes === null ? "no end known" : size(now.store.free_bytes)],
    ["Up since", moment(now.started_ms)],
  ];
  $("tiles").replaceChildren(...tiles.map(([name, value]) => {
    const tile = element("div");
    tile.append(element("dt", name), element("dd", value));
    return tile;
  }));
  const gates = (now.card && now.card.gates) || [];
  fill(table("gates"), gates.length ? gates.map((gate) => [
    words(gate.metric), number(gate.value, 4),
    (gate.direction === "at_least" ? "at least " : "at most ") + gate.threshold,
    element("td", gate.passed ? "passed" : "failed", gate.passed ? "good" : "bad"),
  ]) : [["no gates", "", "", ""]]);
  const healthy = now.obstacles.length === 0;
  $("health").textContent = healthy ? "ready" : "not ready: " + now.obstacles.join("; ");
  $("health").className = healthy ? "good" : "bad";
  $("about").textContent = `Version ${now.program}, base ${now.base.slice(0, 12)}…, ${now.method}${now.plain ? ", plain" : ""}`;
}

function showRounds() {
  fill(table("rounds-table"), lists.rounds.map((round) => [
    String(round.round), moment(round.finished_ms),
    element("td", round.outcome, round.published ? "good" : "bad"),
    String(round.version), `${round.updates}/${round.selected}`, percent(round.safe_rate),
    percent(round.over_refusal), number(round.held_out_loss, 4),
    Object.entries(round.seconds).map(([stage, seconds]) => `${stage} ${seconds.toFixed(1)}`).join(", ") || "–",
    element("td", round.reason || "", "why"),
  ]));
  plot(lists.rounds.slice().reverse());
}

const SVG = "http://www.w3.org/2000/svg";
function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}
function plot(rounds) {
  const [left, right, top, bottom] = [40, 600, 10, 125];
  const x = (index) => (rounds.length < 2 ? (left + right) / 2 : left + (index * (right - left)) / (rounds.length - 1));
  const parts = [drawn("line", { x1: left, y1: bottom, x2: right, y2: bottom, class: "axis" })];
  const losses = rounds.map((round) => round.held_out_loss).filter((loss) => loss !== null);
  const [low, high] = [Math.min(...losses), Math.max(...losses)];
  const lines = [
    ["safe", (round) => round.safe_rate, (rate) => bottom - rate * (bottom - top)],
    ["loss", (round) => round.held_out_loss, (loss) => bottom - ((loss - low) / (high - low || 1)) * (bottom - top)],
  ];
  for (const [name, of, y] of lines) {
    const points = rounds.map((round, index) => [x(index), of(round)]).filter(([, value]) => value !== null)
      .map(([at, value]) => [at, y(value)]);
    parts.push(drawn("polyline", { class: name, points: points.map((point) => point.join(",")).join(" ") }));
    parts.push(...points.map(([cx, cy]) => drawn("circle", { class: name, cx, cy, r: 3 })));
  }
  parts.push(drawn("text", { x: 2, y: top + 8 }, "100 %"), drawn("text", { x: 2, y: bottom }, "0 %"));
  if (losses.length) parts.push(drawn("text", { x: right + 5, y: top + 8 }, high.toFixed(2)), drawn("text", { x: right + 5, y: bottom }, low.toFixed(2)));
  if (rounds.length) parts.push(drawn("text", { x: left, y: 145 }, "round " + rounds[0].round), drawn("text", { x: right, y: 145, "text-anchor": "end" }, "round " + rounds.at(-1).round));
  $("plot").replaceChildren(...parts);
  $("plot-title").textContent = "Release in force after each round: share of safe answers (line, left), held-out loss (dashes, right)";
}

function showReleases() {
  fill(table("releases-table"), lists.releases.map((release) => {
    const gates = release.report_card.gates;
    return [
      String(release.version), release.parent === null ? "–" : String(release.parent),
      release.round === null ? (release.parent === null ? "init" : "roll-back") : "round " + release.round,
      moment(release.created_ms), percent(release.report_card.safe_rate), number(release.report_card.held_out_loss, 4),
      gates.length ? `${gates.filter((gate) => gate.passed).length} of ${gates.length} passed` : "none",
      element("td", release.digest.slice(0, 16) + "…", "name"),
    ];
  }));
}

function showTrials(trials, now) {
  const trial = trials.trial;
  $("trials-text").textContent = trials.share === 0
    ? "Releases go to all devices at once (release.canary_share is 0)."
    : trial
      ? `Release ${trial.version} is tried on ${percent(trials.share)} of the devices (${trial.active} are active); the others keep release ${trials.stable}. ` +
        `A verdict needs ${trials.reports_wanted} reports of either, or more than ${percent(trials.failures_max)} of the devices that cannot install it; without one it is for all at ${moment(trial.until_ms)}.`
      : `Nothing is on trial; a round's release is tried on ${percent(trials.share)} of the devices first.`;
  const loss = (count, median) => (median === null ? String(count) : `${count}, median ${median.toFixed(2)}`);
  const said = (devices) => {
    const faults = Object.entries(devices.faults).map(([fault, count]) => `${words(fault)} ${count}`);
    return [String(devices.told), String(devices.installed), element("td", faults.join(", ") || "0", faults.length ? "bad" : "")];
  };
  const running = trial ? [[
    String(trial.version), element("td", "on trial", "quiet"), ago(trial.since_ms, now), ...said(trial.devices),
    loss(trial.reports, trial.loss), loss(trial.reports_before, trial.loss_before), element("td", "", "why"),
  ]] : [];
  const ended = trials.ended.map((end) => [
    String(end.version), element("td", end.rolled_back ? "rolled back" : "for all devices", end.rolled_back ? "bad" : "good"),
    moment(end.since_ms), ...said(end.devices), String(end.reports), String(end.reports_before), element("td", end.reason, "why"),
  ]);
  fill(table("trials-table"), running.concat(ended));
}

function showDevices(now) {
  const only = $("only").value;
  fill(table("devices-table"), lists.devices.filter((device) => !only || device.state === only).map((device) => [
    element("td", device.device, "name"),
    element("td", device.state, { online: "good", revoked: "bad", expired: "bad" }[device.state] || "quiet"),
    ago(device.seen_ms, now), device.installed === null ? "–" : String(device.installed),
    moment(device.enrolled_ms), moment(device.expires_ms),
  ]));
}

function showEvents() {
  const only = $("refusals").checked;
  const shown = events.filter((told) => !only || told.event === "refused").slice(-200).reverse();
  $("events-list").replaceChildren(...shown.map((told) => {
    const item = element("li", null, ["refused", "rejected", "retrying", "troubled", "rolled_back"].includes(told.event) ? "bad" : "");
    item.append(element("time", new Date(told.at_ms).toLocaleTimeString()), told.sentence);
    return item;
  }));
}

// Newest rows replace what is shown of them; rows that were asked for further down stay.
function renew(list, rows, key) {
  const known = new Set(rows.map((row) => row[key]));
  lists[list] = rows.concat(lists[list].filter((row) => !known.has(row[key])));
}

async function look() {
  const now = await ask("standing");
  const told = await ask("events?after=" + lastEvent);
  if (told.length) {
    lastEvent = told.at(-1).sequence;
    events = events.concat(told).slice(-500);
    showEvents();
  }
  showNow(now);
  // Rounds and releases change when the round or the head does.
  const state = JSON.stringify([now.round.round, now.release && now.release.version, now.started_ms]);
  if (state !== seen) {
    if (seen && JSON.parse(seen)[2] !== now.started_ms) { lastEvent = 0; events = []; }
    renew("rounds", await ask("rounds?limit=" + PAGE), "round");
    renew("releases", await ask("releases?limit=" + PAGE), "version");
    showRounds();
    showReleases();
    seen = state;
  }
  showTrials(await ask("trials"), now.now_ms);
  const wanted = Math.min(500, Math.max(PAGE, lists.devices.length));
  const rows = await ask("devices?limit=" + wanted);
  lists.devices = rows.concat(lists.devices.slice(rows.length));
  showDevices(now.now_ms);
  for (const button of document.querySelectorAll("button.more")) {
    const list = button.dataset.list, rowsNow = lists[list];
    button.hidden = list === "devices"
      ? rowsNow.length >= now.devices.active + now.devices.expired + now.devices.revoked
      : !rowsNow.length || rowsNow.at(-1)[list === "rounds" ? "round" : "version"] === 0;
  }
}

async function more(list) {
  const last = lists[list].at(-1);
  if (list === "devices") lists.devices = lists.devices.concat(await ask(`devices?limit=${PAGE}&after=${last.device}`));
  else {
    const key = list === "rounds" ? "round" : "version";
    lists[list] = lists[list].concat(await ask(`${list}?limit=${PAGE}&before=${last[key]}`));
  }
  showRounds(); showReleases(); showDevices(Date.now());
}

async function live() {
  clearTimeout(timer);
  try {
    await look();
    $("door").hidden = true; $("main").hidden = false; $("leave").hidden = false;
    sessionStorage.setItem(KEY, token);
  } catch (error) {
    if (error instanceof Refused) return leave("This is not the token.");
    $("health").textContent = "no answer: " + error.message;
    $("health").className = "bad";
  }
  timer = setTimeout(live, LOOK_MS);
}

function leave(why) {
  clearTimeout(timer);
  sessionStorage.removeItem(KEY);
  token = null; lastEvent = 0; events = []; seen = ""; lists = { rounds: [], releases: [], devices: [] };
  $("main").hidden = true; $("leave").hidden = true; $("door").hidden = false;
  $("health").textContent = "not connected"; $("health").className = "";
  $("refused").textContent = why || "";
  $("token").value = ""; $("token").focus();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  live();
});
$("leave").addEventListener("click", () => leave());
$("only").addEventListener("change", () => showDevices(Date.now()));
$("refusals").addEventListener("change", showEvents);
for (const button of document.querySelectorAll("button.more")) {
  button.addEventListener("click", () => more(button.dataset.list).catch((error) => { $("health").textContent = error.message; }));
}
// `aggregator dashboard` puts the token behind the #, which no browser sends; it leaves the address at once.
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) history.replaceState(null, "", location.pathname);
token = given || sessionStorage.getItem(KEY);
if (token) live(); else leave();
