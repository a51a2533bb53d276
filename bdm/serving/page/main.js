// The page: a form, what is being drawn, and what was drawn.

import { Form } from "./form.js";
import { Gallery, title } from "./gallery.js";
import { Refused, drawing, get, remove, send } from "./server.js";
import { language, setLanguage, usualLanguage, word } from "./words.js";

const at = (id) => document.getElementById(id);
setLanguage(usualLanguage());
const form = new Form();
const gallery = new Gallery((request) => restore(request));
const running = new Map();

function tell(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

function translate(name) {
  setLanguage(name);
  at("language").textContent = name === "zh" ? "English" : "中文";
  at("language").lang = name === "zh" ? "en" : "zh";
  form.translate();
}

async function begin() {
  translate(language());
  const [server, library, jobs] = await Promise.all([get("/v1/server"), get("/v1/library"), get("/v1/jobs")]);
  at("server").textContent = server.model.name;
  await form.fill(server, library.files);
  if (jobs.lost.length) tell(`${jobs.lost.length} ${word("lost")}`);
  await gallery.older();
}

async function draw() {
  const body = await form.body();
  const stop = new AbortController();
  const batch = { ids: new Set(), stop };
  running.set(batch, batch);
  at("cancel").disabled = false;
  tell("");
  if (matchMedia("(max-width: 899px)").matches) at("stage").scrollIntoView();
  try {
    for await (const [name, content] of drawing(body, stop.signal)) {
      await happened(batch, name, content, body.request);
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    running.delete(batch);
    at("cancel").disabled = !running.size;
    for (const id of batch.ids) document.querySelector(`#running [data-id="${id}"]`)?.remove();
  }
}

async function happened(batch, name, content, request) {
  if (name === "end") return;
  batch.ids.add(content.id);
  const item = document.querySelector(`#running [data-id="${content.id}"]`) ?? added(content.id, request);
  if (name === "done") {
    await gallery.newest();
    tell(word("done"));
  } else if (name === "cancelled") tell(word("cancelled"));
  else if (name === "returned") tell(word("returned"), true);
  else if (name === "failed") tell(`${word("failed")} ${content.error}`, true);
  else showStep(item, name, content);
  if (["done", "cancelled", "returned", "failed"].includes(name)) {
    batch.ids.delete(content.id);
    item.remove();
  }
}

function added(id, request) {
  const item = document.createElement("li");
  const image = new Image();
  const bar = document.createElement("progress");
  const said = document.createElement("p");
  item.dataset.id = id;
  image.alt = word("preview");
  image.className = "tiny";
  image.hidden = true;
  bar.setAttribute("aria-label", title(request) || word("picture"));
  said.className = "help";
  item.append(image, bar, said);
  at("running").append(item);
  return item;
}

function showStep(item, name, content) {
  const [image, bar, said] = item.children;
  bar.max = content.steps || 1;
  bar.value = content.step;
  said.textContent = name === "queued" ? word("queued") : `${word("running")} ${content.step} / ${content.steps}`;
  if (name === "preview") {
    image.hidden = false;
    image.src = `data:image/png;base64,${content.image}`;
  }
}

async function cancel() {
  for (const batch of running.values()) {
    await Promise.allSettled([...batch.ids].map((id) => remove(`/v1/jobs/${id}`)));
  }
}

function restore(request) {
  const missing = form.restore(request);
  tell(missing.length ? `${word("restored")} ${word("missing")} ${missing.join(", ")}` : word("restored"),
    missing.length > 0);
  at("prompt").focus();
}

async function restoreFile(file) {
  restore((await send("/v1/info", file)).request);
}

// Whatever goes wrong is told where everything is told.
function guarded(work) {
  return (...given) => Promise.resolve(work(...given)).catch((error) => {
    tell(error instanceof Refused ? error.message : String(error), true);
  });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(draw)();
});
at("cancel").addEventListener("click", guarded(cancel));
at("language").addEventListener("click", () => translate(language() === "zh" ? "en" : "zh"));
at("restore-file").addEventListener("change", guarded(async (event) => {
  const [file] = [...event.target.files];
  event.target.value = "";
  if (file) await restoreFile(file);
}));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  at("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").hidden = true;
});
document.addEventListener("drop", guarded(async (event) => {
  event.preventDefault();
  at("drop").hidden = true;
  const [file] = event.dataTransfer.files;
  if (file) await restoreFile(file);
}));
guarded(begin)();
