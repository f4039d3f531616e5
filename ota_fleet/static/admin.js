// What the pages can do better with a script; without one, everything works as well.
"use strict";

const SCRIPTED = { "X-OTA-Script": "1" }; // a page's way on comes in a field, not by a redirect

function make(name, text = "", attributes = {}) {
  const element = document.createElement(name);
  element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// -- The secret of the first set-up: it stands behind the #, which no server and no log sees.

function takeFragment() {
  const field = document.querySelector("[data-fragment]");
  const secret = decodeURIComponent(location.hash.slice(1));
  if (!field || !secret || secret === "main") return;
  field.value = secret;
  history.replaceState(null, "", location.pathname + location.search);
  document.querySelector("input[type=email]")?.focus();
}

// -- Copy buttons. Browsers have a clipboard for pages by HTTPS only; there is an older way.

async function copy(button) {
  const text = button.closest(".copied").querySelector("code").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", text, { readonly: "", class: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 2000);
}

// -- One box that ticks all of a table

function tickAll(box) {
  for (const each of box.form.querySelectorAll(`input[name="${box.dataset.all}"]`)) each.checked = box.checked;
}

// -- Parts of a page that keep themselves fresh: <... id="figures" data-live="10">, in seconds

function isBusy(part) {
  return part.contains(document.activeElement) || part.querySelector("details[open], :checked") !== null;
}

function renew(part, page) {
  const fresh = page.getElementById(part.id);
  if (fresh) improve(fresh);
  if (fresh && fresh.innerHTML !== part.innerHTML && !isBusy(part)) {
    part.replaceChildren(...document.adoptNode(fresh).childNodes);
  }
}

async function refresh(parts) {
  const reply = await fetch(location.href, { headers: SCRIPTED, redirect: "error" });
  if (!reply.ok) throw new Error(`The server answered ${reply.status}`);
  const page = new DOMParser().parseFromString(await reply.text(), "text/html");
  for (const part of parts) renew(part, page);
}

// One question a tick for all parts that are due; what is not fresh says so.
function keepFresh(parts) {
  let last = new Date();
  let stale = null;
  const due = new Map(parts.map((part) => [part, Date.now() + 1000 * part.dataset.live]));
  const tick = async () => {
    const now = Date.now() + 100; // timers may be a little early
    const chosen = parts.filter((part) => due.get(part) <= now && !isBusy(part));
    if (document.hidden || !chosen.length) return;
    for (const part of chosen) due.set(part, now + 1000 * part.dataset.live);
    try {
      await refresh(chosen);
      last = new Date();
      stale?.remove();
      stale = null;
    } catch {
      if (stale) return;
      stale = make("p", `Not fresh since ${last.toLocaleTimeString()}. `, { role: "status", class: "note warn" });
      stale.append(make("a", "Load the page again", { href: location.pathname + location.search }));
      document.querySelector("main").prepend(stale);
    }
  };
  const seconds = Math.min(...parts.map((part) => Number(part.dataset.live)));
  const again = () => setTimeout(() => tick().finally(again), 1000 * seconds);
  again();
}

// -- Uploads: each file by itself, with its progress

function send(url, fields, file, tell) {
  return new Promise((resolve, reject) => {
    const data = new FormData();
    for (const [key, value] of fields) data.append(key, value);
    data.append("file", file);
    const request = new XMLHttpRequest();
    request.open("POST", url);
    for (const [key, value] of Object.entries(SCRIPTED)) request.setRequestHeader(key, value);
    request.upload.onprogress = (event) => tell(event.loaded / event.total);
    request.onerror = () => reject(new Error("The server cannot be reached, or it stopped reading."));
    request.onload = () => {
      const next = request.getResponseHeader("X-OTA-Next");
      if (request.status === 200 && next) resolve(next);
      else reject(new Error(reasonOf(request)));
    };
    request.send(data);
  });
}

function reasonOf(request) {
  const page = new DOMParser().parseFromString(request.responseText, "text/html");
  return page.querySelector("[role=alert]")?.textContent || `The server answered ${request.status}.`;
}

async function uploadAll(url, fields, files) {
  const { layer, box } = overlay("busy");
  layer.addEventListener("cancel", (event) => event.preventDefault()); // Escape
  layer.showModal();
  layer.setAttribute("aria-labelledby", "upload-title");
  const title = make("h2", "Uploading", { id: "upload-title" });
  const label = make("p", "", { id: "upload-label", role: "status" });
  const bar = make("progress", "", { max: 1, value: 0, "aria-labelledby": "upload-label" });
  box.append(title, label, bar);
  let next = "";
  let failed = 0;
  for (const file of files) {
    const tell = (part) => {
      bar.value = part;
      label.textContent = part < 1 ? `${file.name}: ${Math.floor(100 * part)} %` : `${file.name} is being looked at`;
    };
    tell(0);
    try {
      next = await send(url, fields, file, tell);
    } catch (error) {
      failed += 1;
      box.append(make("p", `${file.name}: ${error.message}`, { role: "alert", class: "note bad" }));
    }
  }
  if (!failed) return location.assign(next);
  bar.hidden = label.hidden = true;
  title.textContent = "Not everything was taken";
  const button = make("button", next ? "Go on with the others" : "Close", { type: "button", class: "main" });
  button.addEventListener("click", () => (next ? location.assign(next) : layer.remove()));
  box.append(button);
  button.focus();
}

function overlay(kind) {
  const layer = make("dialog", "", { class: `drop ${kind}` });
  const box = make("div");
  layer.append(box);
  document.body.append(layer);
  return { layer, box };
}

function submitFiles(event) {
  const form = event.target;
  const input = form.querySelector("input[type=file]");
  if (!input?.files.length) return;
  event.preventDefault();
  const fields = [...new FormData(form, event.submitter)].filter(([name]) => name !== input.name);
  uploadAll(form.action, fields, [...input.files]);
}

function takeDrops(url, csrf) {
  let layer = null;
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && !document.querySelector(".drop.busy");
  const hide = () => {
    layer?.remove();
    layer = null;
  };
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    if (layer) return;
    layer = overlay("over").layer;
    layer.firstChild.append(make("h2", "Drop the firmware here"), make("p", "What is inside is shown before anything is published."));
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && hide());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    hide();
    const files = [...event.dataTransfer.files];
    if (files.length) uploadAll(url, [["csrf", csrf]], files);
  });
}

// -- What is where

function improve(part) {
  for (const button of part.querySelectorAll("button.copy")) button.hidden = false;
  for (const time of part.querySelectorAll("time")) time.title = new Date(time.dateTime).toLocaleString();
}

addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) copy(button);
});
addEventListener("change", (event) => event.target.dataset.all && tickAll(event.target));
addEventListener("submit", (event) => event.target.hasAttribute("data-upload") && submitFiles(event));

improve(document);
takeFragment();
const live = [...document.querySelectorAll("[data-live][id]")];
if (live.length) keepFresh(live);
for (const box of document.querySelectorAll("[data-all]")) box.hidden = false;
if (document.body.dataset.drop) takeDrops(document.body.dataset.drop, document.body.dataset.csrf);
