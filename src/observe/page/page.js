// The page of a hub or a source. Reads /api/v1/live (server-sent events: everything at first, then
// each second the rows that changed), /api/v1/history and /api/v1/status. Changes nothing.
"use strict";

const find = (id) => document.getElementById(id);
const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const make = (name, text, attributes = {}) => {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
};

// ---- figures in words ----

const bytes = (count) => {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  let value = count;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${at === 0 ? value : value.toFixed(1)} ${units[at]}`;
};
const seconds = (count) => {
  if (count === null || count === undefined) return "–";
  if (count < 10 && count % 1 !== 0) return `${count.toFixed(1)} s`;
  const whole = Math.floor(count);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
};
const share = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)}%` : "–");

// ---- the table ----

const RANK = ["faulted", "fenced", "offline", "failed-over", "behind", "syncing", "waiting", "in-sync", "retired"];
// What a newer process calls otherwise comes last.
const rank = (row) => (RANK.includes(row.state) ? RANK.indexOf(row.state) : RANK.length);
const COLUMNS = [
  { title: "Source", key: (row) => row.name, text: null },
  { title: "State", key: rank, text: (row) => row.state },
  { title: "CP", key: (row) => row.cp ?? -1, text: (row) => String(row.cp ?? "–"), number: true },
  { title: "Lag", key: (row) => row.lag_bytes ?? Infinity, text: (row) => bytes(row.lag_bytes), number: true },
  { title: "Lag time", key: (row) => row.lag_seconds ?? Infinity, text: (row) => seconds(row.lag_seconds), number: true },
  { title: "Image age", key: (row) => row.image_age_seconds ?? Infinity, text: (row) => seconds(row.image_age_seconds), number: true },
  { title: "Writes", key: (row) => row.bytes_per_second, text: (row) => `${bytes(row.bytes_per_second)}/s`, number: true },
  { title: "Reason", key: (row) => row.reason, text: (row) => row.reason, wide: true },
];
const known = new Map(); // name -> { row, tr, cells }
let sort = { column: 1, up: true };
let order = [];
// Rows in the document; a table of thousands that changes every second is slow to lay out.
const PAGE = 100;
let limit = PAGE;

const head = () => {
  const line = document.querySelector("thead tr");
  COLUMNS.forEach((column, index) => {
    const cell = make("th", undefined, { scope: "col" });
    if (column.number) cell.className = "number";
    const button = make("button", column.title, { type: "button" });
    button.addEventListener("click", () => {
      sort = { column: index, up: sort.column === index ? !sort.up : !column.number };
      marks();
      arrange();
    });
    cell.append(button);
    line.append(cell);
  });
  marks();
};
const marks = () => {
  document.querySelectorAll("thead th").forEach((cell, index) => {
    if (index === sort.column) cell.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  });
};

const rowOf = (row) => {
  const tr = make("tr");
  const button = make("button", row.name, { type: "button", "aria-haspopup": "dialog" });
  button.addEventListener("click", () => open(row.name));
  const cells = COLUMNS.map((column, index) => {
    const cell = make(index === 0 ? "th" : "td");
    if (index === 0) { cell.scope = "row"; cell.append(button); }
    if (column.number) cell.className = "number";
    if (column.wide) cell.className = "wide";
    tr.append(cell);
    return cell;
  });
  cells[1].className = "state";
  return { row, tr, cells };
};
const show = (entry) => {
  if (!entry.tr.isConnected) return;
  COLUMNS.forEach((column, index) => { if (column.text) set(entry.cells[index], column.text(entry.row)); });
  entry.cells[1].dataset.state = entry.row.state;
};

const matches = (row) => {
  const wanted = find("search").value.trim().toLowerCase();
  const state = find("filter").value;
  return (state === "" || row.state === state)
    && (wanted === "" || row.name.toLowerCase().includes(wanted) || row.reason.toLowerCase().includes(wanted));
};
const arrange = () => {
  const key = COLUMNS[sort.column].key;
  const entries = [...known.values()].filter((entry) => matches(entry.row));
  entries.sort((a, b) => {
    const [x, y] = [key(a.row), key(b.row)];
    const by = typeof x === "string" ? x.localeCompare(y) : x - y;
    return (sort.up ? by : -by) || a.row.name.localeCompare(b.row.name, undefined, { numeric: true });
  });
  const names = entries.map((entry) => entry.row.name);
  const shown = entries.slice(0, limit);
  const rest = names.length - limit;
  find("more").hidden = rest <= 0;
  if (rest > 0) set(find("more"), `show ${Math.min(rest, PAGE)} more of ${rest}`);
  set(find("shown"), names.length === known.size ? `${known.size} sources` : `${names.length} of ${known.size} sources`);
  find("none").hidden = names.length > 0 || known.size === 0;
  if (shown.length === order.length && shown.every((entry, index) => entry.row.name === order[index])) return;
  order = shown.map((entry) => entry.row.name);
  // Where the keyboard is, it stays.
  const focused = document.activeElement;
  find("rows").replaceChildren(...shown.map((entry) => entry.tr));
  shown.forEach(show);
  if (focused && focused !== document.activeElement && document.contains(focused)) focused.focus();
};

// ---- lines of the last hour ----

// The largest lag, and that there may be more where one is not known.
const lagOf = (rows) => {
  const most = rows.reduce((least, row) => Math.max(least, row.lag_seconds ?? 0), 0);
  return rows.some((row) => row.lag_seconds === null) ? `${seconds(most)} or more` : seconds(most);
};
const line = (svg, values) => {
  svg.replaceChildren();
  if (values.length < 2) return;
  const most = Math.max(...values, 1e-9);
  const step = 360 / (values.length - 1);
  const path = (name, d) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", "path");
    if (name) node.setAttribute("class", name);
    node.setAttribute("d", d);
    svg.append(node);
  };
  // What was not known is a gap.
  let run = [];
  const close = () => {
    if (run.length > 0) {
      const points = run.map(([x, y]) => `${x} ${y}`).join("L");
      path("area", `M${run[0][0]} 40L${points}L${run[run.length - 1][0]} 40Z`);
      path("", `M${points}`);
    }
    run = [];
  };
  values.forEach((value, index) => {
    if (value === null) close();
    else run.push([(index * step).toFixed(1), (38 - (36 * value) / most).toFixed(1)]);
  });
  close();
};
const history = async (source) => {
  const answer = await fetch(`api/v1/history${source ? `?source=${encodeURIComponent(source)}` : ""}`);
  return answer.ok ? answer.json() : { lag_seconds: [], bytes_per_second: [] };
};
const hour = async () => {
  try {
    const all = await history();
    line(find("rate-line"), all.bytes_per_second);
    line(find("lag-line"), all.lag_seconds);
    if (opened) await detailHistory();
  } catch {
    // The link line says that nobody answers; the next round tries again.
  }
};

// ---- one source ----

let opened = null;
const open = (name) => {
  opened = name;
  set(find("detail-name"), name);
  for (const id of ["detail-policy", "detail-space", "detail-rate", "detail-lag"]) set(find(id), "");
  find("volumes").replaceChildren();
  find("seeds").replaceChildren();
  find("detail-rate-line").replaceChildren();
  find("detail-lag-line").replaceChildren();
  detail();
  find("detail").showModal();
  void detailHistory();
  void detailVolumes(name);
};
const STEPS = [
  ["acknowledged", "answered to clients"], ["staged", "in the hub's ring"], ["drained", "in the source log"],
  ["applied", "in the new tree"], ["visible", "in the image"],
];
const detail = () => {
  const entry = known.get(opened);
  if (!entry) { find("detail").close(); return; }
  const row = entry.row;
  const state = find("detail-state");
  set(state, row.state);
  state.className = "state";
  state.dataset.state = row.state;
  set(find("detail-reason"), row.reason);
  set(find("detail-next"), ["", "nothing to do"].includes(row.next_step) ? "" : `Next: ${row.next_step}`);
  set(find("detail-rate"), `${bytes(row.bytes_per_second)}/s`);
  set(find("detail-lag"), `${bytes(row.lag_bytes)}, ${seconds(row.lag_seconds)}; ${row.image_age_seconds === null ? "no image yet" : `CP ${row.cp ?? "–"}, image ${seconds(row.image_age_seconds)} old`}`);
  const ladder = find("ladder");
  const most = Math.max(row.acknowledged_bytes, 1);
  if (ladder.children.length === 0) {
    for (const [step, where] of STEPS) {
      const bar = make("dd", undefined, { "aria-hidden": "true" });
      bar.append(make("div", undefined, { class: "bar" }));
      bar.firstChild.append(make("span"));
      ladder.append(make("dt", `${step}, ${where}`), bar, make("dd"));
    }
  }
  STEPS.forEach(([step], index) => {
    const value = row[`${step}_bytes`];
    const wait = row[`${step}_seconds`] ?? 0;
    ladder.children[index * 3 + 1].firstChild.firstChild.style.width = value === null ? "0" : `${(100 * value) / most}%`;
    set(ladder.children[index * 3 + 2], wait > 0 ? `${bytes(value)}, oldest waits ${seconds(wait)}` : bytes(value));
  });
};
const detailHistory = async () => {
  const name = opened;
  const own = await history(name);
  if (opened !== name) return;
  line(find("detail-rate-line"), own.bytes_per_second);
  line(find("detail-lag-line"), own.lag_seconds);
};
const detailVolumes = async (name) => {
  const answer = await fetch("api/v1/status");
  if (!answer.ok || opened !== name) return;
  const status = await answer.json();
  const source = (status.sources ?? [status.source]).find((one) => one.name === name);
  if (!source) return;
  const policy = source.policy;
  set(find("detail-policy"), policy
    ? `mode ${policy.mode}, ack ${policy.ack}, apply ${policy.apply}, on_hub_loss ${policy.on_hub_loss}, cache ${policy.cache}; epoch ${source.epoch}, generation ${source.generation}`
    : "not known yet");
  const most = source.pool_limit_bytes === undefined ? "" : ` of ${bytes(source.pool_limit_bytes)} that it may have`;
  set(find("detail-space"), source.pool_used_bytes === undefined ? "" : `Space: ${bytes(source.pool_used_bytes)}${most}`);
  find("volumes").replaceChildren(...source.volumes.map((volume) => {
    const item = make("li", `${volume.name}, ${bytes(volume.size_bytes)} `);
    item.append(make("code", volume.root ?? "no CP yet"));
    return item;
  }));
  find("seeds").replaceChildren(...(source.seeds ?? []).map((seed) => {
    const at = (when) => new Date(when * 1000).toLocaleString();
    const taken = typeof seed.taken_at_seconds === "number" ? `, taken ${at(seed.taken_at_seconds)}` : "";
    const ended = seed.ended_at_seconds === undefined ? "" : `, ${at(seed.ended_at_seconds)}`;
    const next = seed.next_step === "" ? "" : `. Next: ${seed.next_step}`;
    return make("li", `Seed of ${seed.volume}: ${seed.state}${ended}, ${bytes(seed.pool_bytes)} of ${bytes(seed.size_bytes)}${taken}: ${seed.reason}${next}`);
  }));
};

// ---- the whole ----

// A plain device is in, or its process does not run: only those of an array are shown.
const devices = (all) => {
  find("devices-section").hidden = all.length === 0;
  const shown = JSON.stringify(all);
  if (find("devices").dataset.shown === shown) return;
  find("devices").dataset.shown = shown;
  find("devices").replaceChildren(...all.map((device) => {
    const item = make("li");
    const state = make("span", device.state, { class: "state", "data-state": device.state });
    const counts = [[device.read_errors, "read errors"], [device.repaired_blocks, "blocks repaired"], [device.slow_answers, "slow answers"]];
    const more = counts.filter(([count]) => count > 0).map(([count, what]) => `, ${count} ${what}`).join("");
    const why = device.reason ? ` (${device.reason})` : "";
    item.append(make("b", device.name), state, `${device.size_bytes ? bytes(device.size_bytes) : "not there"}${more}${why}`);
    return item;
  }));
};

const whole = (news) => {
  const health = news.health;
  if (health) {
    set(find("health"), health.word);
    find("health").dataset.word = health.word;
    find("reasons").hidden = health.reasons.length === 0;
    find("reasons").querySelector("ul").replaceChildren(...health.reasons.map((reason) => {
      const item = make("li");
      const word = make("b", reason.word);
      word.dataset.word = reason.word;
      const about = reason.text.startsWith(reason.object) ? "" : `${reason.object}: `;
      item.append(word, ` ${about}${reason.text}. `, make("i", reason.next_step));
      return item;
    }));
  }
  if (news.nvram) {
    const { used_bytes: used, capacity_bytes: capacity, durability } = news.nvram;
    set(find("nvram"), share(used, capacity));
    set(find("nvram-text"), `${bytes(used)} of ${bytes(capacity)}, ${durability}`);
    find("nvram-bar").firstChild.style.width = `${(100 * used) / capacity}%`;
  }
  if (news.pool) {
    const pool = news.pool;
    set(find("pool"), share(pool.used_bytes + pool.kept_bytes + pool.pinned_bytes, pool.total_bytes));
    set(find("pool-text"), `${bytes(pool.free_bytes)} free of ${bytes(pool.total_bytes)}; kept ${bytes(pool.kept_bytes)}, pinned ${bytes(pool.pinned_bytes)}`);
    [pool.used_bytes, pool.kept_bytes, pool.pinned_bytes].forEach((part, index) => {
      find("pool-bar").children[index].style.width = `${(100 * part) / pool.total_bytes}%`;
    });
    devices(pool.devices ?? []);
  }
};
const sums = () => {
  const rows = [...known.values()].map((entry) => entry.row);
  const count = new Map();
  for (const row of rows) count.set(row.state, (count.get(row.state) ?? 0) + 1);
  set(find("count"), String(rows.length));
  set(find("states"), RANK.filter((state) => count.has(state)).map((state) => `${count.get(state)} ${state}`).join(", "));
  set(find("rate"), `${bytes(rows.reduce((sum, row) => sum + row.bytes_per_second, 0))}/s`);
  set(find("lag"), lagOf(rows));
  // One that was retired on purpose asks for nothing.
  const bad = rows.filter((row) => !["in-sync", "retired"].includes(row.state)).length;
  document.title = bad > 0 ? `(${bad}) mirrorhub` : "mirrorhub";
};
const EVENTS = 500;
const events = (list, fresh) => {
  const node = find("events");
  if (fresh) node.replaceChildren();
  for (const event of list) {
    const item = make("li");
    const when = new Date(event.at_seconds * 1000);
    item.append(make("time", when.toLocaleTimeString(), { datetime: when.toISOString() }), make("b", event.who));
    const [from, to] = event.what.split(" -> ");
    if (RANK.includes(to)) {
      item.append(`${from} → `, make("span", to, { class: "state", "data-state": to }));
    } else {
      item.append(event.what);
    }
    item.append(event.result === "" ? "" : `: ${event.result}`);
    node.querySelector(".quiet")?.remove();
    node.prepend(item);
  }
  while (node.children.length > EVENTS) node.lastChild.remove();
  if (node.children.length === 0) node.append(make("li", "none since this process started", { class: "quiet" }));
};

const take = (news) => {
  if (news.whole) {
    const names = new Set(news.rows.map((row) => row.name));
    for (const name of [...known.keys()]) if (!names.has(name)) known.delete(name);
  }
  for (const name of news.gone) known.delete(name);
  for (const row of news.rows) {
    const entry = known.get(row.name) ?? rowOf(row);
    entry.row = row;
    known.set(row.name, entry);
    show(entry);
  }
  arrange();
  sums();
  whole(news);
  events(news.events, news.whole);
  if (opened) detail();
};

// ---- begin ----

const follow = () => {
  const feed = new EventSource("api/v1/live");
  let heard = 0;
  feed.onmessage = (event) => {
    heard = Date.now();
    take(JSON.parse(event.data));
    set(find("link"), "live");
    find("link").classList.remove("lost");
  };
  // The browser tries again by itself unless it was refused; then this does.
  feed.onerror = () => {
    const since = heard ? `, figures of ${new Date(heard).toLocaleTimeString()}` : "";
    set(find("link"), `no answer${since}`);
    find("link").classList.add("lost");
    if (feed.readyState === EventSource.CLOSED) setTimeout(follow, 3000);
  };
};
const again = () => { limit = PAGE; arrange(); };
const more = () => { limit += PAGE; arrange(); };
const keys = (event) => {
  const inField = event.target.matches("input, select");
  if (event.key === "/" && !inField) { event.preventDefault(); find("search").focus(); }
  if (event.key === "Escape" && event.target === find("search")) { find("search").value = ""; again(); }
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  if (event.target.matches("select") || find("detail").open) return;
  const buttons = [...document.querySelectorAll("#rows button")];
  if (buttons.length === 0) return;
  const at = buttons.indexOf(document.activeElement);
  const next = event.key === "ArrowDown" ? at + 1 : at - 1;
  event.preventDefault();
  if (next === buttons.length && !find("more").hidden) { more(); keys(event); return; }
  buttons[Math.max(0, Math.min(buttons.length - 1, next))].focus();
};
head();
for (const state of [...RANK].reverse()) find("filter").append(make("option", state, { value: state }));
find("search").addEventListener("input", again);
find("filter").addEventListener("change", again);
find("more").addEventListener("click", more);
find("detail").addEventListener("close", () => { opened = null; });
document.addEventListener("keydown", keys);
follow();
void hour();
setInterval(hour, 10_000);
