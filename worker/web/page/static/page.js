// The page shows two documents: `state`, each second, and `samples`, of the last hour. All texts from the worker become
// text nodes, so no id is ever markup.

import { Plot, clock } from "./plots.js";

const STALE_MS = 6000;
const REOPEN_MS = 5000;
const RATE_MS = 60_000;
const HISTORY = { hour: { width: 3600, count: 48 }, day: { width: 86_400, count: 30 } };

/** How far the worker's clock is ahead of this one. */
let ahead = 0;
const now = () => Date.now() + ahead;

const at = (id) => document.getElementById(id);

// --- texts ---

const whole = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));

function short(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && Math.abs(value) < 10) return value.toLocaleString("en", { maximumSignificantDigits: 2 });
  return Math.abs(value) < 10_000 ? whole(value) : value.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 });
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return seconds === 0 ? "0 s" : `${Math.max(1, Math.round(seconds * 1000))} ms`;
  const steps = [["d", 86_400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = steps.findIndex(([, size]) => seconds >= size);
  const [unit, size] = steps[first];
  if (unit === "s") return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const [smaller, part] = steps[first + 1];
  const rest = Math.floor((seconds % size) / part);
  return `${Math.floor(seconds / size)} ${unit}${rest ? ` ${rest} ${smaller}` : ""}`;
}

/** Invisible characters as escapes: two ids that differ look different. */
const printable = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu, (each) => `\\u{${each.codePointAt(0).toString(16)}}`);

const NAMES = { redis: "Redis", postgres: "Postgres", schema: "Tables", view_counts: "View counts", messages: "Messages", grpc: "gRPC" };
const nameOf = (check) => NAMES[check] ?? check;
// A restart loses views that were only published.
const WAITING = "Meanwhile counters and streams wait in Redis. Messages wait in this worker: do not restart it.";
/** What becomes of views while a server is away. */
const MEANWHILE = {
  redis: "If the application cannot reach Redis either, its views are not counted. What Redis has is written when it is back, as long as it keeps its data.",
  postgres: WAITING,
  schema: WAITING,
};
const STATES = { ok: "ok", hold: "on hold", failing: "failing", starting: "starting" };
const tone = (state) => (state === "ok" ? "ok" : state === "failing" ? "failing" : "hold");
/** The first of a pipeline's rows: it has one for each stream. */
const leads = (pipeline, _, all) => all.find((each) => each.pipeline === pipeline.pipeline) === pipeline;
const perSecond = (value) => (value === null ? "–" : `${short(value)}/s`);
/** Local time, with the date unless it is today. */
const moment = (text) => {
  const time = new Date(text);
  const isToday = time.toDateString() === new Date(now()).toDateString();
  return (isToday ? "" : `${time.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} `) + clock(time / 1000);
};
const times = (count, one, many) => `${whole(count)} ${count === 1 ? one : many}`;

// --- elements ---

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const cell = (content, className = "") => make("td", { className }, content);
const isolated = (id) => make("bdi", {}, printable(id));

/** Replace the children only when `key` differs from the last one: focus stays, and nothing is announced again. */
function renew(element, key, children) {
  const text = JSON.stringify(key);
  if (element.renewedFor === text) return;
  element.renewedFor = text;
  const focused = element.contains(document.activeElement) ? document.activeElement.dataset.id : undefined;
  element.replaceChildren(...children());
  if (focused !== undefined) [...element.querySelectorAll("[data-id]")].find((each) => each.dataset.id === focused)?.focus();
}

/** Show rows of cells `[text, class, note]` in a table's body. Cells that stay the same keep the reader's selection. */
function showRows(body, rows) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, index) => {
    const row = body.rows[index] ?? body.insertRow();
    cells.forEach(([text, className = "", note = ""], column) => {
      const cell = row.cells[column] ?? row.appendChild(column === 0 ? make("th", { scope: "row" }) : make("td", {}));
      cell.className = className;
      renew(cell, [text, note], () => [isolated(text), make("span", { className: "muted" }, note)]);
    });
  });
}

// --- what needs attention ---

/** Checks that are not ok, holds first. Those with the same cause are one problem: the server's, if one is among them. */
function problems(state) {
  const found = new Map();
  for (const [name, check] of Object.entries(state.health.checks)) {
    if (check.status === "ok") continue;
    const key = JSON.stringify([check.status, check.cause, check.remedy]);
    found.set(key, { check, names: [...(found.get(key)?.names ?? []), name] });
  }
  const all = [...found.values()];
  const ordered = [...all.filter(({ check }) => check.status === "hold"), ...all.filter(({ check }) => check.status !== "hold")];
  return ordered.map(({ check, names }) => {
    const servers = names.filter((name) => name in MEANWHILE);
    const shown = servers.length ? servers : names;
    const waiting = names.filter((name) => !shown.includes(name)).map(nameOf);
    return {
      tone: tone(check.status),
      title: `${shown.map(nameOf).join(", ")}: ${STATES[check.status]}`,
      texts: [
        check.cause,
        check.remedy && `What to do: ${check.remedy}`,
        waiting.length > 0 && `Waiting for it: ${waiting.join(", ")}.`,
        ...servers.map((name) => check.status === "failing" && MEANWHILE[name]),
      ],
    };
  });
}

function notices(state) {
  const found = [];
  const add = (title, ...texts) => found.push({ tone: "hold", title, texts });
  const quarantined = Object.entries(state.health.quarantined_keys ?? {});
  if (quarantined.length) {
    const count = Math.max(quarantined.length, state.views?.quarantinedKeys ?? 0);
    const more = count > 5 ? `; and ${whole(count - 5)} more` : "";
    const listed = quarantined.slice(0, 5).map(([key, reason]) => `${printable(key)}: ${reason}`).join("; ") + more;
    add("Counters that cannot be counted", listed, "They are left as they are, and do not block others.", "What to do: set each key to a whole number, or delete it.");
  }
  if (state.views?.invalidMessages) add(`${times(state.views.invalidMessages, "message", "messages")} that cannot be counted since the start`,
    "Their views are lost unless they were INCRed, too.", "What to do: see `message cannot be counted` in the log; it has the reason and an example.");
  const letters = Object.entries(state.lookups.deadLetters ?? {}).filter(([name]) => name !== "error");
  for (const [pipeline, count] of letters) {
    const more = count >= 10_000 ? " or more" : "";
    add(`${nameOf(pipeline)}: ${times(count, "dead letter", "dead letters")}${more}`,
      "Records that cannot become rows; their bytes are kept.", "What to do: see why with `viewer-worker dead-letters show`; then replay or purge them.");
  }
  for (const pipeline of state.pipelines) {
    if (pipeline.lost) add(`${pipeline.name}: ${times(pipeline.lost, "entry", "entries")} lost since the start`,
      "They were deleted or trimmed before they were carried.", "What to do: let the stream keep entries for longer; `viewer-worker streams` shows how far it is carried.");
    if (pipeline.stream !== undefined && pipeline.gaps) add(`${pipeline.name}: ${times(pipeline.gaps, "gap", "gaps")} since the start`,
      "Entries may have been lost there, their number unknown: the stream was deleted, or is another one. The log has the cause.");
  }
  for (const { pipeline, dropped } of state.pipelines.filter(leads)) {
    if (dropped) add(`${pipeline}: ${times(dropped, "record", "records")} dropped since the start`,
      "They are neither rows nor dead letters. The log has the cause.");
  }
  if (state.views?.dropped) add(`${times(state.views.dropped, "published view", "published views")} dropped since the start`,
    "They are lost unless they were INCRed, too: another worker took the lease, or too many ids were waiting.");
  return found;
}

/** A paragraph; what is between backticks is code. */
function paragraph(text) {
  const parts = text.split("`").map((part, index) => (index % 2 ? make("code", {}, part) : part));
  return make("p", {}, ...parts);
}

function card({ tone, title, texts }) {
  const paragraphs = texts.filter(Boolean).map(paragraph);
  return make("article", { className: `card ${tone}` }, make("h3", {}, title), ...paragraphs);
}

/** Cards that stay the same stay in place, so that a screen reader reads only what is new. */
function showCards(element, cards) {
  const keys = cards.map((each) => JSON.stringify(each));
  for (const shown of [...element.children]) if (!keys.includes(shown.dataset.key)) shown.remove();
  cards.forEach((each, index) => {
    if (element.children[index]?.dataset.key === keys[index]) return;
    const known = [...element.children].find((shown) => shown.dataset.key === keys[index]) ?? card(each);
    known.dataset.key = keys[index];
    element.insertBefore(known, element.children[index] ?? null);
  });
}

function calm(state) {
  const byHolder = new Map();
  for (const [name, check] of Object.entries(state.health.checks)) {
    if (check.role === "standing by") byHolder.set(check.holder, [...(byHolder.get(check.holder) ?? []), nameOf(name)]);
  }
  const texts = [...byHolder].map(([holder, names]) => `${names.join(", ")}: ${holder} does this. This worker takes over if it stops.`);
  return { tone: "ok", title: texts.length ? "All checks pass. Another worker does the work." : "All checks pass.", texts };
}

function showAttention(state) {
  const cards = state === null
    ? [{ tone: "failing", title: "This page has lost the worker", texts: ["It does not answer, or too many pages are open. What is shown below is old.", "What to do: see whether the process runs, and what its log ends with. The page connects again by itself."] }]
    : [...problems(state), ...notices(state)];
  if (state !== null && problems(state).length === 0) cards.unshift(calm(state));
  showCards(at("attention"), cards);
}

// --- state ---

const WORDS = { healthy: ["Healthy", "ok"], degraded: ["Degraded", "hold"], unhealthy: ["Unhealthy", "failing"] };

function showStatus(text, tone) {
  const pill = at("status");
  if (pill.textContent !== text) pill.textContent = text;
  pill.className = `pill ${tone}`;
  document.title = `${text} · viewer-worker`;
}

function showState(state) {
  const [text, tone] = state.stopping ? ["Stopping", "hold"] : WORDS[state.health.status];
  showStatus(text, tone);
  const { host, pid, uptimeSeconds, source } = state.worker;
  const parts = [`${host}, process ${pid}`, `version ${state.health.version}`, `up ${duration(uptimeSeconds)}`];
  if (source !== "default") parts.push(`source ${source}`);
  at("identity").textContent = [...parts, `at ${new Date(state.health.timestamp).toLocaleTimeString("en-GB")}`].join(" · ");
  showAttention(state);
  showParts(state);
  at("views").hidden = at("top").hidden = state.views === null;
  if (state.views !== null) {
    showViews(state);
    showTop(state.lookups);
  }
  at("pipelines").hidden = state.pipelines.length === 0;
  showPipelines(state);
}

/** Other roles change many times a second, or follow from who does it. */
const SHOWN_ROLES = ["standing by", "waiting"];
const shownRole = (role) => (SHOWN_ROLES.includes(role) ? `, ${role}` : "");

/** Text and tone. What moves data waits while a server is away, and finds out at its next step. */
function stateOf(check, checks) {
  if (check.status !== "ok") return [STATES[check.status], tone(check.status)];
  const away = Object.keys(MEANWHILE).find((server) => checks[server].status === "failing");
  if (check.role !== undefined && away !== undefined) return [`waits for ${nameOf(away)}`, "hold"];
  return [`ok${shownRole(check.role)}`, "ok"];
}

function doer(check) {
  if (check.role === "standing by") return check.holder;
  if (check.role === "waiting") return "nobody";
  return check.role === undefined ? "–" : "this worker";
}

function showParts(state) {
  const places = { redis: ` ${state.worker.redis}`, postgres: ` ${state.worker.postgres}` };
  showRows(at("part-rows"), Object.entries(state.health.checks).map(([name, check]) => [
    [nameOf(name), "", places[name]], stateOf(check, state.health.checks), [duration(check.for_seconds)], [doer(check)],
  ]));
}

function showViews({ views, health }) {
  const { view_counts: check, redis } = health.checks;
  const elsewhere = check.role === "standing by";
  at("views-elsewhere").hidden = !elsewhere;
  at("views-here").hidden = elsewhere;
  at("views-holder").textContent = elsewhere ? check.holder : "";
  // By the worker's clock: this one may differ.
  const agreed = (Date.parse(health.timestamp) - views.lastAgreementMs) / 1000;
  const isKnown = redis.status === "ok";
  const numbers = [
    ["Views written", perSecond(written())],
    ["Messages received", perSecond(rate("messages"))],
    ["Ids that wait", isKnown ? whole(views.pendingIds) : "not known"],
    ["The oldest waits for", !isKnown ? "not known" : views.pendingIds ? duration(views.oldestPendingSeconds) : "–"],
    ["Time of a flush", duration(ratio("flushSeconds", "flushRounds"))],
    ["Views per flush", short(ratio("views", "flushes"))],
    ["Last time all was written", views.lastAgreementMs === null ? "not yet" : `${duration(Math.max(0, Math.round(agreed)))} ago`],
    ["Written since this start", whole(views.flushedViews)],
  ];
  const list = at("view-numbers");
  if (list.children.length === 0) list.append(...numbers.map(([name]) => make("div", {}, make("dt", {}, name), make("dd", {}))));
  numbers.forEach(([, text], index) => {
    const shown = list.children[index].lastChild;
    if (shown.textContent !== text) shown.textContent = text;
  });
}

function showPipelines(state) {
  const letters = state.lookups.deadLetters;
  showRows(at("pipeline-rows"), state.pipelines.map((pipeline, ...others) => {
    const check = state.health.checks[pipeline.name];
    const known = (text, warns) => [check.role === "standing by" ? "–" : text, warns ? "number hold" : "number"];
    const stored = letters?.[pipeline.pipeline] ?? 0;
    return [
      [pipeline.name],
      stateOf(check, state.health.checks),
      known(short(rate(pipeline.name))),
      known(whole(pipeline.stream === undefined ? pipeline.queued : pipeline.backlog)),
      known(duration(pipeline.oldestUnreadSeconds)),
      // They are stored for the pipeline, not for each stream.
      [letters === undefined || letters.error ? "–" : leads(pipeline, ...others) ? whole(stored) : "", stored ? "number hold" : "number"],
      // Of a channel nobody knows how many were missed.
      known(whole(pipeline.lost ?? null), pipeline.lost),
    ];
  }));
}

function showTop({ top, readAt }) {
  renew(at("top-rows"), top?.top, () => (top?.top ?? []).map((entry) => {
    const button = make("button", { className: "link", type: "button" }, isolated(entry.vodId));
    button.dataset.id = entry.vodId;
    button.addEventListener("click", () => openHistory(entry.vodId, true));
    return make("tr", {}, cell(button), cell(whole(entry.views), "number"), cell(whole(entry.total), "number"));
  }));
  at("top-table").hidden = !top?.top?.length;
  at("top-note").textContent = topNote(top, readAt);
}

function topNote(top, readAt) {
  if (top === undefined) return "Not read yet.";
  if (top.error) return `Not known: ${top.error}`;
  const since = moment(top.since);
  const inexact = top.exact === false ? " The totals are not exact: flushing is on hold, or Redis and Postgres disagree." : "";
  const read = `Read at ${new Date(readAt).toLocaleTimeString("en-GB")}.${inexact}`;
  if (top.top.length === 0) return `No views were flushed since ${since}. ${read}`;
  return `By the views that were flushed since ${since}. Totals include views that wait for a flush. ${read}`;
}

// --- samples ---

let columns = [];
let rows = [];
let interval = 0;

const plots = {
  views: new Plot(at("plot-views"), "Views and messages a second", short),
  pending: new Plot(at("plot-pending"), "Ids that wait for a flush", short),
  flush: new Plot(at("plot-flush"), "Time of a flush", duration),
  records: new Plot(at("plot-records"), "Records a second", short),
  history: new Plot(at("plot-history"), "Views by hour or day (UTC)", short, { bars: true }),
};

/** Long enough for two flushes: between them nothing is written. */
const rateWindow = () => Math.max(RATE_MS, 2000 * interval);

/** The row from which the change up to row `index` is taken. */
function base(index, window) {
  const since = rows[index][0] - window;
  let first = index;
  while (first > 0 && rows[first][0] > since) first -= 1;
  return first;
}

function change(index, column, window) {
  const of = columns.indexOf(column);
  const first = base(index, window);
  return rows[index][of] - rows[first][of];
}

function rateBetween(first, last, of) {
  const seconds = (rows[last][0] - rows[first][0]) / 1000;
  return seconds > 0 ? (rows[last][of] - rows[first][of]) / seconds : null;
}

const rateAt = (index, column, window) => rateBetween(base(index, window), index, columns.indexOf(column));

/** Views are written in steps, one a flush. From flush to flush, as between any two moments the rate would jump. */
function writtenAt(index) {
  const of = columns.indexOf("views");
  const isStep = (row) => row > 0 && rows[row][of] !== rows[row - 1][of];
  const first = base(index, rateWindow());
  // The first flush after a start writes what came before it, too.
  if (rows[index][0] - rows[first][0] < 1000 * interval) return null;
  let last = index;
  while (last > first && !isStep(last)) last -= 1;
  let before = first;
  while (before > 0 && !isStep(before) && rows[first][0] - rows[before][0] < 1000 * interval) before -= 1;
  return last > first && isStep(before) ? rateBetween(before, last, of) : rateBetween(first, index, of);
}

function ratioAt(index, column, other, window) {
  const count = change(index, other, window);
  return count > 0 ? change(index, column, window) / count : null;
}

const rate = (column) => (rows.length ? rateAt(rows.length - 1, column, RATE_MS) : null);
const written = () => (rows.length ? writtenAt(rows.length - 1) : null);
const ratio = (column, other) => (rows.length ? ratioAt(rows.length - 1, column, other, rateWindow()) : null);

function showSamples(samples) {
  columns = samples.columns;
  rows = [...rows, ...samples.rows].slice(-720);
  // Those above the newest are of a clock that was set back.
  rows = rows.filter(([ms]) => ms <= rows.at(-1)[0]);
  const seconds = rows.map(([ms]) => ms / 1000);
  const all = (value) => rows.map((_, index) => value(index));
  const of = (column) => rows.map((row) => row[columns.indexOf(column)]);
  if (!at("views").hidden && !at("views-here").hidden) {
    plots.views.show(seconds, {
      written: all(writtenAt),
      messages: all((index) => rateAt(index, "messages", RATE_MS)),
    });
    plots.pending.show(seconds, { ids: of("pendingIds") });
    plots.flush.show(seconds, { mean: all((index) => ratioAt(index, "flushSeconds", "flushRounds", rateWindow())) });
  }
  if (!at("pipelines").hidden) {
    const names = columns.slice(columns.indexOf("oldestPendingSeconds") + 1);
    plots.records.show(seconds, Object.fromEntries(names.map((name) => [name, all((index) => rateAt(index, name, RATE_MS))])));
  }
}

// --- history of an id ---

let asked = { id: "", isOfList: false, bucket: "hour", abort: new AbortController() };

function openHistory(id, isOfList) {
  Object.assign(asked, { id, isOfList });
  at("history-id").replaceChildren(isolated(id));
  if (!at("history").open) at("history").showModal();
  showHistory();
}

async function fetchJson(path, signal) {
  const answer = await fetch(path, { signal });
  const body = await answer.json();
  if (!answer.ok) throw new Error(body.error);
  return body;
}

async function showHistory() {
  asked.abort.abort();
  asked.abort = new AbortController();
  const { id, bucket, abort: { signal } } = asked;
  const { width, count } = HISTORY[bucket];
  const last = Math.floor(now() / 1000 / width) * width;
  const first = last - (count - 1) * width;
  at("history-total").textContent = "Reading …";
  try {
    // Browsers take these out of every path, however they are written.
    if (id === "." || id === "..") throw new Error(`a browser cannot ask for this id. Run: viewer-worker history ${id}`);
    const [{ views: [found] }, history] = await Promise.all([
      fetchJson(`v1/views?ids=${encodeURIComponent(id)}`, signal),
      fetchJson(`v1/views/${encodeURIComponent(id)}/history?bucket=${bucket}&from=${first * 1000}`, signal),
    ]);
    const views = new Map(history.buckets.map((each) => [Date.parse(each.time) / 1000, each.views]));
    const starts = Array.from({ length: count }, (_, index) => first + index * width);
    const pending = found.pending ? `, ${whole(found.pending)} of them not flushed yet` : "";
    at("history-total").textContent = `${times(found.views, "view", "views")}${pending}. Flushed up to ${moment(history.asOf)}.${found.exact === false ? " The number is not exact: flushing is on hold, or Redis and Postgres disagree." : ""}`;
    plots.history.show(starts, { [`in the ${bucket}`]: starts.map((start) => views.get(start) ?? 0) });
    at("history-rows").replaceChildren(...starts.filter((start) => views.has(start)).reverse().map((start) =>
      make("tr", {}, cell(new Date(start * 1000).toISOString().slice(0, bucket === "day" ? 10 : 16).replace("T", " ")), cell(whole(views.get(start)), "number"))));
  } catch (error) {
    if (!signal.aborted) at("history-total").textContent = `Not known: ${error.message}`;
  }
}

for (const choice of document.querySelectorAll("input[name=bucket]")) {
  choice.addEventListener("change", () => {
    asked.bucket = choice.value;
    showHistory();
  });
}
at("history").addEventListener("close", () => {
  asked.abort.abort();
  if (!asked.isOfList) return;
  // The button that had the focus may have been replaced meanwhile.
  const button = [...at("top-rows").querySelectorAll("button")].find((each) => each.dataset.id === asked.id);
  (button ?? at("lookup-id")).focus();
});
at("lookup").addEventListener("submit", (event) => {
  event.preventDefault();
  openHistory(at("lookup-id").value, false);
});

// --- the connection ---

let source = null;
let heardAt = Date.now();
let openedAt = 0;

function open() {
  source?.close();
  openedAt = Date.now();
  source = new EventSource("events");
  let isFirst = true;
  source.addEventListener("open", () => (isFirst = true));
  source.addEventListener("samples", (event) => {
    if (isFirst) rows = [];
    isFirst = false;
    showSamples(JSON.parse(event.data));
  });
  source.addEventListener("state", (event) => {
    const state = JSON.parse(event.data);
    ahead = Date.parse(state.health.timestamp) - Date.now();
    interval = state.views?.flushIntervalSeconds ?? 0;
    const wasHidden = at("views").hidden && at("pipelines").hidden;
    showState(state);
    // What could not be shown was not heard.
    heardAt = Date.now();
    document.body.classList.remove("stale");
    if (wasHidden && rows.length) showSamples({ columns, rows: [] });
  });
}

function close() {
  source?.close();
  source = null;
  // The title of a tab in the background would go on to say that all is well.
  showStatus("Paused", "hold");
}

setInterval(() => {
  if (document.hidden) return;
  [heardAt, openedAt] = [heardAt, openedAt].map((each) => Math.min(each, Date.now())); // the clock may be set back
  if (Date.now() - heardAt > STALE_MS) {
    document.body.classList.add("stale");
    showStatus("No connection", "failing");
    showAttention(null);
  }
  // The browser connects again by itself, but neither after a refusal nor where the network swallows everything. A slow
  // network gets the time to deliver the first event.
  const patience = source?.readyState === EventSource.CLOSED ? REOPEN_MS : 3 * STALE_MS;
  if (Date.now() - Math.max(heardAt, openedAt) > patience) open();
}, 1000);

// Hidden pages would use up the few connections that a browser opens to one host.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    close();
  } else {
    heardAt = Date.now();
    showStatus("Connecting", "");
    open();
  }
});

if (document.hidden) close();
else open();
