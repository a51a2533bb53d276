// What was drawn: kept by the server, so it is there after a restart.

import { get, remove, show } from "./server.js";
import { language, word } from "./words.js";

const at = (id) => document.getElementById(id);
const NAMES = { prompt: "native", prompt_en: "english", negative: "negativeNative", negative_en: "negativeEnglish",
  seed: "seed", steps: "steps", guidance: "guidance", sampler: "sampler", schedule: "schedule",
  branch_scale: "branchScale", world: "world", width: "width", height: "height",
  english_guidance: "englishGuidance", branch_schedule: "branchSchedule" };
const OTHERS = { enlarge: "enlarge", clip_skip: "clipSkip", rules: "rules", branch_start: "branchStart",
  branch_end: "branchEnd", approximation: "approximation", precision: "precision", versions: "versions" };

export class Gallery {
  constructor(use) {
    this.use = use;
    this.oldest = "";
    this.shown = null;
    at("more").addEventListener("click", () => this.older());
    at("detail-close").addEventListener("click", () => at("detail").close());
    at("detail-use").addEventListener("click", () => {
      at("detail").close();
      this.use(this.shown.request);
    });
    at("detail-remove").addEventListener("click", () => this.remove());
  }

  async older() {
    const page = await get(`/v1/history?limit=24&before=${this.oldest}`);
    for (const picture of page.pictures) at("gallery").append(this.item(picture));
    this.oldest = page.pictures.at(-1)?.id ?? this.oldest;
    at("more").hidden = !page.more;
  }

  async newest() {
    const known = new Set([...at("gallery").children].map((item) => item.dataset.id));
    const page = await get("/v1/history?limit=24");
    for (const picture of page.pictures.reverse()) {
      if (!known.has(picture.id)) at("gallery").prepend(this.item(picture));
    }
    this.oldest ||= page.pictures[0]?.id ?? "";
  }

  item(picture) {
    const item = document.createElement("li");
    const button = document.createElement("button");
    const image = new Image();
    const said = document.createElement("p");
    const text = title(picture.request);
    item.dataset.id = picture.id;
    button.type = "button";
    button.className = "open";
    image.alt = "";
    image.loading = "lazy";
    said.className = "said";
    said.textContent = text || word("picture");
    show(image, picture.picture);
    button.append(image, said);
    button.addEventListener("click", () => this.open(picture));
    item.append(button);
    return item;
  }

  open(picture) {
    this.shown = picture;
    show(at("detail-picture"), picture.picture);
    at("detail-picture").alt = title(picture.request) || word("picture");
    at("detail-save").href = picture.picture;
    at("detail-save").download = `${picture.id}.png`;
    at("detail-use").disabled = !picture.request;
    at("detail-list").replaceChildren(...rows(picture.request ?? {}));
    at("detail").showModal();
  }

  async remove() {
    await remove(`/v1/history/${this.shown.id}`);
    document.querySelector(`#gallery [data-id="${this.shown.id}"]`)?.remove();
    at("detail").close();
  }
}

export function title(request) {
  return [request?.prompt, request?.prompt_en].filter(Boolean).join(" · ");
}

// All settings; those that the form names first, in its words.
function rows(request) {
  const found = [];
  for (const [name, key] of Object.entries(NAMES)) {
    if (request[name] !== "" && request[name] !== null && request[name] !== undefined) {
      found.push(...row(word(key), String(request[name])));
    }
  }
  if (request.model) found.push(...row(word("model"), `${request.model.name} [${request.model.hash}]`));
  for (const plugin of request.plugins ?? []) {
    found.push(...row(plugin.kind, `${plugin.name} ${plugin.strength}`));
  }
  for (const use of request.beside ?? []) found.push(...row(word("beside"), `${use.prompt} ${use.scale}`));
  if (request.mode && request.mode.name !== "text") found.push(...row(word("mode"), request.mode.name));
  for (const [name, value] of Object.entries(request)) {
    if (!(name in NAMES) && !["model", "plugins", "beside", "mode"].includes(name) && value !== "" && value !== null) {
      found.push(...row(word(OTHERS[name] ?? name), typeof value === "object" ? brief(value) : String(value)));
    }
  }
  return found;
}

function row(name, value) {
  const term = document.createElement("dt");
  const said = document.createElement("dd");
  term.textContent = name;
  said.textContent = value;
  return [term, said];
}

function brief(value) {
  return Object.entries(value).filter(([, one]) => one !== "" && one !== null).map(([name, one]) => `${name} ${one}`).join(language() === "zh" ? "，" : ", ");
}
