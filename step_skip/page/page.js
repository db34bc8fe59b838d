"use strict";
// The videos near the screen play in step: the one furthest behind leads, the others wait for it, and all start
// again together. To seek instead of waiting would cost more decoding, on a machine that is slow already.
// The others are not loaded: browsers allow a page only so many, Chromium 75, on a phone 40.
const $ = (id) => document.getElementById(id);
const videos = [...document.querySelectorAll("main video")];
const results = [...document.querySelectorAll("figure[data-result]")];
const [button, place, shown, dialog, stage] = ["play", "place", "shown", "large", "stage"].map($);
const frame = 1 / document.body.dataset.fps, lost = 0.5;  // seconds; further ahead than `lost` a video goes back
const near = new Set(), patience = 10000;  // milliseconds
let time = 0, frames = 1, waiting = 0, playing;

// --- what is kept in the browser: stars and choices, by the page's place -------------------------------------

const key = location.pathname;
function load() {
  try { return JSON.parse(localStorage.getItem(key)) || {}; } catch { return {}; }
}
const kept = Object.assign({ stars: [], sort: "", find: "", starred: false, speed: "1" }, load());
const stars = new Set(kept.stars);
function keep() {
  kept.stars = [...stars];
  try { localStorage.setItem(key, JSON.stringify(kept)); } catch { /* a browser that keeps nothing */ }
}

// --- playing -------------------------------------------------------------------------------------------------

const isOver = (video) => video.currentTime > video.duration - frame / 2;
const isReady = (video) => video.readyState >= 2 && !video.seeking;
const isOpen = () => dialog.open;
const group = () => isOpen() ? [$("a"), $("b")].filter((video) => video.hasAttribute("src")) : [...near];

function setPlaying(value) {
  playing = value;
  for (const each of [button, $("large_play")]) each.textContent = playing ? "Pause" : "Play";
  if (!playing) for (const video of [...videos, $("a"), $("b")]) video.pause();
}

function seek(video) {
  const target = Math.min(time, (video.duration || Infinity) - frame / 2);
  if (video.currentTime !== target) video.currentTime = target;
}

function go(video) {
  video.playbackRate = Number($("speed").value);
  video.play().catch((error) => { if (error.name === "NotAllowedError") setPlaying(false); });
}

function advance(now, all) {
  const late = all.filter((video) => !isReady(video));
  if (!late.length) waiting = now;
  else if (now - waiting > patience) late.filter((video) => near.has(video)).forEach(enter), waiting = now;  // a seek may hang: load it again
  if (late.length) return all.forEach((video) => video.pause());
  const playable = all.filter((video) => !isOver(video));
  time = playable.length ? Math.min(...playable.map((video) => video.currentTime)) : 0;
  for (const video of all) {
    const ahead = video.currentTime - time;
    if (ahead > lost || !playable.length) seek(video);
    else if (ahead > frame) video.pause();
    else if (video.paused && !isOver(video)) go(video);
  }
}

function tick(now) {
  const all = group();
  if (playing && all.length) advance(now, all);
  place.max = frames - 1;
  place.value = Math.floor(time / frame);
  shown.textContent = 1 + Number(place.value) + " / " + frames;
  requestAnimationFrame(tick);
}

function show(number) {
  setPlaying(false);
  time = (Math.max(0, Math.min(frames - 1, number)) + 0.5) * frame;  // the middle: rounding can't reach another
  group().forEach(seek);
}

function fail(video) {
  const note = document.createElement("p");
  note.className = "problem";
  note.textContent = "This browser cannot play the video.";
  near.delete(video);
  watch.unobserve(video);
  video.closest(".frame").replaceWith(note);
}

const watch = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) isIntersecting ? enter(target) : leave(target);
}, { rootMargin: "25%" });

function enter(video) {
  near.add(video);
  video.src = video.dataset.src;
  seek(video);
}

function leave(video) {
  if (!near.delete(video)) return;
  video.removeAttribute("src");
  video.load();
}

for (const video of [...videos, $("a"), $("b")]) {
  video.addEventListener("loadedmetadata", () => {
    frames = Math.max(frames, Math.round(video.duration / frame));
  });
}
for (const video of videos) {
  video.addEventListener("error", () => fail(video));
  watch.observe(video);
}
for (const each of [button, $("large_play")]) each.addEventListener("click", () => setPlaying(!playing));
place.addEventListener("input", () => show(Number(place.value)));
$("speed").addEventListener("change", () => {
  for (const video of group()) video.playbackRate = Number($("speed").value);
  kept.speed = $("speed").value;
  keep();
});

// --- stars, order, filter ------------------------------------------------------------------------------------

const textOf = (figure, part) => figure.querySelector(part)?.textContent ?? "";
const nameOf = (figure) => [textOf(figure, ".name"), textOf(figure, ".steps")].filter(Boolean).join(", ");
const homes = results.map((figure) => figure.parentElement);

function drawStar(each, figure) {
  const on = stars.has(figure.dataset.result);
  each.setAttribute("aria-pressed", on);
  each.textContent = (on ? "★" : "☆") + (each.id ? " Star" : "");
}

function toggleStar(figure) {
  const name = figure.dataset.result;
  stars.delete(name) || stars.add(name);
  drawStar(figure.querySelector(".star"), figure);
  keep();
  if (kept.starred) arrange();
}

function arrange() {
  const { sort, find, starred } = kept, words = find.toLowerCase().split(/\s+/);
  const flat = Boolean(sort || find.trim() || starred);
  const up = sort === "forwards" || sort === "seconds" || sort === "flicker";  // little first
  const value = (figure) => Number(figure.dataset[sort] ?? (up ? Infinity : -Infinity));
  const listed = results.filter((figure) => {
    const text = figure.textContent.toLowerCase();
    return (!starred || stars.has(figure.dataset.result)) && words.every((word) => text.includes(word));
  });
  if (sort) listed.sort((one, other) => (up ? 1 : -1) * (value(one) - value(other)) || 0);
  if (flat) $("flat").replaceChildren(...listed);
  else results.forEach((figure, number) => homes[number].append(figure));
  $("flat").hidden = !flat;
  for (const section of document.querySelectorAll("section")) section.hidden = flat;
}

results.forEach((figure) => {
  const star = document.createElement("button");
  star.className = "star";
  star.setAttribute("aria-label", "star: " + nameOf(figure));
  drawStar(star, figure);
  star.addEventListener("click", () => toggleStar(figure));
  figure.prepend(star);
});
for (const name of ["sort", "find", "starred"]) {
  const field = $(name), part = field.type === "checkbox" ? "checked" : "value";
  field[part] = kept[name];
  if (part === "value" && field.value !== kept[name]) kept[name] = field.value;
  field.addEventListener("input", () => { kept[name] = field[part]; keep(); arrange(); });
}
$("speed").value = kept.speed;
$("measures").hidden = !results.some((figure) => figure.dataset.identity);
arrange();

// --- enlarged, and two compared ------------------------------------------------------------------------------

const figures = () => [...document.querySelectorAll("main figure")].filter((figure) =>
  figure.offsetParent && figure.querySelector("video"));
let current = null, choices = [];

function setSource(video, figure) {
  if (figure) video.src = figure.querySelector("video").dataset.src;
  else video.removeAttribute("src"), video.load();
  video.hidden = !figure;
  if (figure) seek(video);
}

function compare() {
  const other = choices[$("other").value], mode = $("mode").value;
  stage.className = other ? mode : "";
  setSource($("b"), other);
  $("wipe").hidden = !other || mode !== "wipe";
  wipe();
}

function wipe() {
  const part = $("wipe").value / 10;
  $("b").style.clipPath = stage.className === "wipe" ? `inset(0 0 0 ${part}%)` : "none";
}

function enlarge(figure) {
  const before = choices[$("other").value];
  choices = figures();
  current = figure;
  $("other").replaceChildren(new Option("nothing", ""), ...choices.map((each, number) =>
    new Option(`${number < 9 ? number + 1 + ": " : ""}${nameOf(each)}`, number)));
  $("other").value = before && before !== figure ? choices.indexOf(before) : "";
  if (!isOpen()) dialog.showModal();
  const { command, more, json } = figure.dataset, source = figure.querySelector("video").dataset.src;
  $("large_name").textContent = nameOf(figure);
  $("told").textContent = [...figure.querySelector("figcaption").childNodes]
    .filter((node) => !node.classList?.contains("name") && !node.classList?.contains("steps"))
    .map((node) => node.textContent).filter(Boolean).join(" · ");
  $("command").textContent = command ?? "";
  $("copy").hidden = !command;
  $("copy_more").hidden = !more;
  $("large_star").hidden = !figure.dataset.result;
  if (figure.dataset.result) drawStar($("large_star"), figure);
  for (const id of ["download", "mp4"]) $(id).href = source;
  $("json").hidden = !json;
  $("json").href = json ?? "";
  setSource($("a"), figure);
  compare();
}

async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a browser that asks first, or forbids it
    $("command").textContent = text;
    getSelection().selectAllChildren($("command"));
    document.execCommand("copy");
  }
  const before = said.textContent;
  said.textContent = "Copied";
  setTimeout(() => { said.textContent = before; }, 1200);
}

document.querySelector("main").addEventListener("click", (event) => {
  const link = event.target.closest(".frame");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  enlarge(link.closest("figure"));
});
$("other").addEventListener("input", compare);
$("mode").addEventListener("input", compare);
$("wipe").addEventListener("input", wipe);
$("close").addEventListener("click", () => dialog.close());
$("copy").addEventListener("click", () => copy(current.dataset.command, $("copy")));
$("copy_more").addEventListener("click", () => copy(current.dataset.more, $("copy_more")));
$("large_star").addEventListener("click", () => { toggleStar(current); drawStar($("large_star"), current); });
dialog.addEventListener("close", () => {
  setSource($("a"), null);
  setSource($("b"), null);
  near.forEach(seek);
});

// --- keys ----------------------------------------------------------------------------------------------------

function another(step) {
  const at = choices.indexOf(current) + step;
  if (choices[at]) enlarge(choices[at]);
}

function setMode(mode) {
  $("mode").value = mode;
  if (!$("other").value) $("other").value = choices.findIndex((each) => each !== current);
  compare();
}

const inDialog = {
  ArrowUp: () => another(-1), ArrowDown: () => another(1), w: () => setMode("wipe"), d: () => setMode("difference"),
  s: () => $("large_star").click(),
};
const anywhere = {
  " ": () => setPlaying(!playing),
  ArrowLeft: () => show(Math.floor(time / frame) - 1), ArrowRight: () => show(Math.floor(time / frame) + 1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
  if (event.key === " " && event.target.closest("button, summary, a")) return;
  let run = anywhere[event.key] ?? (isOpen() ? inDialog[event.key] : undefined);
  if (/^[1-9]$/.test(event.key)) {
    const number = event.key - 1;
    if (!isOpen()) run = figures()[number] && (() => enlarge(figures()[number]));
    else if (choices[number] && choices[number] !== current) run = () => { $("other").value = number; compare(); };
  }
  if (!run) return;
  event.preventDefault();
  run();
});

// --- while the sweep runs: reload, but not under the user's hands --------------------------------------------

const until = Number(document.body.dataset.until || 0) * 1000;
let touched = 0;
for (const kind of ["pointerdown", "keydown", "input"]) {
  document.addEventListener(kind, () => { touched = Date.now(); });
}
if (until) {
  const reload = setInterval(() => {
    if (Date.now() > until) {
      $("progress").textContent = "The sweep seems to have ended early; the same command goes on.";
      clearInterval(reload);
    } else if (!isOpen() && Date.now() - touched > 10000) location.reload();
  }, 10000);
  $("progress").textContent = Date.now() > until ? "" : "The sweep is running; this page reloads itself.";
}

setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
requestAnimationFrame(tick);
