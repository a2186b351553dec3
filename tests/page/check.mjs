// Opens the page in a real headless Chromium and judges it. Prints one JSON line of what it measured;
// exits 1 with the first thing that is wrong.
//   node check.mjs live URL NAME PICTURES       the page of a running hub; NAME is killed when "ready" is printed
//   node check.mjs many FILES COUNT PICTURES    the page's own files with COUNT made-up sources
import assert from "node:assert/strict";
import { readFile, mkdir } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { chromium } from "playwright-core";

const require = createRequire(import.meta.url);
const [mode, where, what, pictures] = process.argv.slice(2);
const ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

const openPage = async (browser, url, colorScheme) => {
  const context = await browser.newContext({ colorScheme, viewport: { width: 1400, height: 900 }, bypassCSP: false });
  const page = await context.newPage();
  const wrong = [];
  page.on("console", (message) => { if (message.type() === "error") wrong.push(message.text()); });
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("request", (request) => {
    const asked = new URL(request.url());
    if (asked.protocol !== "data:" && asked.origin !== new URL(url).origin) wrong.push(`asked ${asked}`);
  });
  await page.goto(url);
  await page.waitForSelector("#rows tr");
  const paint = await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0].startTime);
  const rows = await page.evaluate(() => performance.now());
  return { page, wrong, paint, rows };
};
const accessible = async (page, name) => {
  // The tool is put in by the browser's own hand: the page's policy lets no script in.
  await page.evaluate(await readFile(require.resolve("axe-core/axe.min.js"), "utf8"));
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const words = found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.target).join(" ")}`);
  assert.deepEqual(words, [], `accessibility of ${name}`);
};
const keyboard = async (page, name, seeded) => {
  await page.keyboard.press("/");
  await page.keyboard.type(name);
  assert.equal(await page.locator("#rows tr").count(), 1, "the search leaves one");
  await page.keyboard.press("ArrowDown");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), name);
  await page.keyboard.press("Enter");
  await page.waitForSelector("#detail[open]");
  assert.equal(await page.locator("#detail-name").textContent(), name);
  assert.equal(await page.locator("#ladder dt").count(), 5);
  await page.waitForFunction(() => document.querySelectorAll("#volumes li").length > 0);
  // In the same step as the volumes.
  const seeds = await page.locator("#seeds li").allTextContents();
  assert.equal(seeds.length, seeded ? 1 : 0, "seeds");
  if (seeded) assert.match(seeds[0], seeded);
};
const leave = async (page) => {
  await page.keyboard.press("Escape");
  await page.waitForSelector("#detail:not([open])", { state: "attached" });
  await page.locator("#search").focus();
  await page.keyboard.press("Escape");
};

const live = async (browser) => {
  const figures = {};
  for (const scheme of ["light", "dark"]) {
    const { page, wrong, paint } = await openPage(browser, where, scheme);
    await page.waitForFunction(() => document.getElementById("link").textContent === "live");
    await accessible(page, scheme);
    await keyboard(page, what);
    await accessible(page, `${scheme}, with details`);
    await page.screenshot({ path: `${pictures}/detail-${scheme}.png` });
    await leave(page);
    await page.screenshot({ path: `${pictures}/fleet-${scheme}.png` });
    assert.deepEqual(wrong, []);
    assert.equal(await page.locator("#devices-section").isVisible(), false, "a plain device is no array");
    figures[scheme] = { paint };
    if (scheme === "dark") {
      console.log("ready");
      figures.shown = await change(page, what);
      await page.screenshot({ path: `${pictures}/offline-${scheme}.png` });
      await page.waitForFunction((name) => [...document.querySelectorAll("#events li")]
        .some((one) => one.textContent.includes(name) && one.textContent.includes("in-sync → offline")), what);
      await accessible(page, "with something wrong");
    }
    await page.context().close();
  }
  return figures;
};
// Milliseconds from the first answer of the API that says so to the page showing it.
const change = (page, name) => page.evaluate(async (wanted) => {
  const stateOf = () => [...document.querySelectorAll("#rows tr")]
    .find((tr) => tr.querySelector("button").textContent === wanted).querySelector(".state").textContent;
  let told = null;
  const until = performance.now() + 30_000;
  while (performance.now() < until) {
    if (told === null) {
      const status = await (await fetch("api/v1/status")).json();
      if (status.sources.find((source) => source.name === wanted).state !== "in-sync") told = performance.now();
    }
    if (told !== null && stateOf() !== "in-sync") return performance.now() - told;
    await new Promise((resolve) => { setTimeout(resolve, 50); });
  }
  throw new Error("the change was never shown");
}, name);

// Milliseconds until the table shows `state` for the source.
const shown = (page, name, state) => page.evaluate(async ([wanted, word]) => {
  const begun = performance.now();
  while (performance.now() < begun + 30_000) {
    const tr = [...document.querySelectorAll("#rows tr")].find((one) => one.querySelector("button").textContent === wanted);
    if (tr?.querySelector(".state").textContent === word) return performance.now() - begun;
    await new Promise((resolve) => { setTimeout(resolve, 20); });
  }
  throw new Error(`${wanted} was never shown as ${word}`);
}, [name, state]);

const STATES = ["in-sync", "in-sync", "in-sync", "in-sync", "syncing", "behind", "offline"];
const fake = (index, second) => ({
  name: `filer-${String(index).padStart(4, "0")}`, state: STATES[index % STATES.length], reason: "every acknowledged write is durable here",
  next_step: "", cp: 100 + second, image_age_seconds: second % 10, lag_bytes: index * 4096 * (second % 3), lag_seconds: second % 3,
  bytes_per_second: index * 1000 + second, acknowledged_bytes: 9000 * index, staged_bytes: 8000 * index, drained_bytes: 7000 * index,
  applied_bytes: 7000 * index, visible_bytes: 6000 * index, volumes: 1,
});
const many = async (browser) => {
  const count = Number(what);
  const files = { "/": ["index.html", "text/html"], "/page.css": ["page.css", "text/css"], "/page.js": ["page.js", "text/javascript"] };
  const whole = { schema: 1, gone: [], health: { word: "ok", reasons: [] },
    nvram: { used_bytes: 1, capacity_bytes: 2, durability: "fdatasync" },
    pool: { total_bytes: 100, free_bytes: 40, used_bytes: 30, kept_bytes: 20, pinned_bytes: 10, devices: [
      { name: "/dev/disk/by-id/a", state: "in", size_bytes: 1 << 30, read_errors: 0, repaired_blocks: 3, slow_answers: 0 },
      { name: "/dev/disk/by-id/b", state: "failed", reason: "it was not there at the start", size_bytes: 0, read_errors: 7, repaired_blocks: 0, slow_answers: 1 },
      { name: "/dev/disk/by-id/c", state: "rebuilding", size_bytes: 1 << 30, read_errors: 0, repaired_blocks: 0, slow_answers: 0 },
    ] } };
  const event = (number, who, did, result) => ({ number, at_seconds: 1_795_000_000 + number, who, what: did, result });
  const flips = new Map(); // what a source is from now on, whatever it was
  // All that is wrong is one that was retired: nothing is to be done.
  let quiet = false;
  const server = createServer(async (request, response) => {
    const path = new URL(request.url, "http://x").pathname;
    if (files[path]) {
      const [name, type] = files[path];
      response.writeHead(200, { "content-type": type });
      response.end(await readFile(`${where}/${name}`));
    } else if (path === "/api/v1/live") {
      response.writeHead(200, { "content-type": "text/event-stream" });
      let second = 0;
      const send = () => {
        const rows = Array.from({ length: count }, (_, index) => fake(index, second));
        for (const row of rows) row.state = flips.get(row.name) ?? (quiet ? "in-sync" : row.state);
        const events = second > 0 ? [event(2 + second, "filer-0000", "scrub", "done")]
          : [event(0, "root", "checkpoint source=filer-0001", "done"), event(1, "filer-0002", "in-sync -> offline", "not heard")];
        response.write(`data: ${JSON.stringify({ ...whole, whole: second === 0, rows, events })}\n\n`);
        second += 1;
      };
      send();
      const timer = setInterval(send, 1000);
      response.on("close", () => clearInterval(timer));
    } else if (path === "/api/v1/history") {
      response.end(JSON.stringify({ lag_seconds: Array.from({ length: 360 }, (_, x) => x % 7), bytes_per_second: Array.from({ length: 360 }, (_, x) => x * x) }));
    } else {
      const seed = { volume: "vol0", state: "waiting", reason: "because", next_step: "connect it", taken_at_seconds: 60, size_bytes: 1 << 30, pool_bytes: 1 << 20 };
      const sources = [{ ...fake(count - 1, 0), policy: null, volumes: [{ name: "vol0", size_bytes: 1 << 30, root: null }], seeds: [seed] }];
      response.end(JSON.stringify({ schema: 1, sources }));
    }
  });
  await new Promise((resolve) => { server.listen(0, "127.0.0.1", resolve); });
  const { page, wrong, paint, rows } = await openPage(browser, `http://127.0.0.1:${server.address().port}/`, "light");
  assert.equal(await page.locator("#rows tr").count(), Math.min(count, 100));
  assert.equal(await page.locator("#count").textContent(), String(count));
  // Worst first: the order of the states, and within one of names.
  assert.equal(await page.locator("#rows tr .state").first().textContent(), "offline");
  // All rows change every second; a key is answered meanwhile.
  const name = `filer-${String(count - 1).padStart(4, "0")}`;
  const before = performance.now();
  await keyboard(page, name, /^Seed of vol0: waiting, 1.0 MiB of 1.0 GiB, taken .+: because. Next: connect it$/);
  const keys = performance.now() - before;
  await leave(page);
  await page.locator("thead th button", { hasText: "Writes" }).click();
  assert.equal(await page.locator("#rows tr button").first().textContent(), name, "the busiest first");
  await page.selectOption("#filter", "offline");
  const offline = Math.floor(count / STATES.length);
  for (let at = 100; at < offline; at += 100) await page.click("#more");
  assert.equal(await page.locator("#rows tr").count(), offline, "more rows come on demand");
  assert.equal(await page.locator("#more").isVisible(), false);
  await page.selectOption("#filter", "");
  const busy = await page.evaluate(() => new Promise((resolve) => {
    let most = 0;
    new PerformanceObserver((list) => { for (const entry of list.getEntries()) most = Math.max(most, entry.duration); })
      .observe({ entryTypes: ["longtask"] });
    setTimeout(() => resolve(most), 3500);
  }));
  // One source changes beside a thousand that do: seen where it belongs, in time.
  await page.locator("thead th button", { hasText: "State" }).click();
  const flipped = "filer-0001";
  flips.set(flipped, "faulted");
  const change = await shown(page, flipped, "faulted");
  assert.equal(await page.locator("#rows tr button").first().textContent(), flipped, "the worst first");
  const devices = await page.locator("#devices li").allTextContents();
  assert.equal(devices.length, 3);
  assert.match(devices[1], /by-id\/b.*failed.*7 read errors.*not there at the start/);
  const told = await page.locator("#events li").allTextContents();
  assert.match(told[0], /scrub: done/, "the newest first");
  assert.match(told.at(-2), /filer-0002.*in-sync → offline: not heard/);
  assert.match(told.at(-1), /root.*checkpoint source=filer-0001: done/);
  await accessible(page, "many");
  await page.screenshot({ path: `${pictures}/many.png`, fullPage: true });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${pictures}/many-dark.png`, fullPage: true });
  // One that was retired is counted, can be asked for, comes last, and wants nobody's attention.
  assert.notEqual(await page.title(), "mirrorhub");
  quiet = true;
  flips.set(flipped, "retired");
  await page.waitForFunction(() => document.title === "mirrorhub");
  assert.equal(await page.locator("#states").textContent(), `${count - 1} in-sync, 1 retired`);
  await page.selectOption("#filter", "retired");
  assert.deepEqual(await page.locator("#rows tr button").allTextContents(), [flipped]);
  await page.selectOption("#filter", "");
  assert.notEqual(await page.locator("#rows tr button").first().textContent(), flipped, "not before those in sync");
  assert.deepEqual(wrong, []);
  await page.context().close();
  server.closeAllConnections();
  server.close();
  return { paint, rows, keys, busy, change };
};

await mkdir(pictures, { recursive: true });
const browser = await chromium.launch({ executablePath: "/usr/bin/chromium", args: ARGS });
try {
  console.log(JSON.stringify(await (mode === "live" ? live : many)(browser)));
} finally {
  await browser.close();
}
