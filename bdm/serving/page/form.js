// The form: what it says as a request, and a request put back into it.

import { Plugins } from "./plugins.js";
import { Start } from "./start.js";
import { post } from "./server.js";
import { word } from "./words.js";

const at = (id) => document.getElementById(id);
const TEXTS = ["prompt", "prompt_en", "negative", "negative_en"];
const NUMBERS = ["width", "height", "steps", "guidance"];
// Fields of a request that the form shows; the others are kept from a picture whose settings were restored.
const SHOWN = [...TEXTS, ...NUMBERS, "seed", "sampler", "schedule", "branch_scale", "world", "plugins", "mode",
  "model", "versions", "precision"];

export class Form {
  constructor() {
    this.base = {};
    this.plugins = new Plugins((text) => this.addEnglish(text));
    this.start = new Start();
    this.usual = {};
    at("one-box").addEventListener("change", () => this.showBox());
    at("box").addEventListener("input", () => this.splitSoon());
    for (const name of ["prompt", "prompt_en"]) {
      at(name).addEventListener("input", () => this.edited());
    }
    at("use-world").addEventListener("change", () => this.showNumbers());
    for (const slider of document.querySelectorAll("form input[type=range]")) {
      slider.addEventListener("input", () => this.showNumbers());
    }
    at("any-seed").addEventListener("change", () => { at("seed").disabled = at("any-seed").checked; });
    at("seed").disabled = true;
    this.showNumbers();
  }

  async fill(server, files) {
    this.usual = server;
    at("width").value ||= server.model.width;
    at("height").value ||= server.model.height;
    at("guidance").value ||= server.guidance;
    at("count").max = server.limits.pictures;
    at("steps").max = server.limits.steps;
    this.plugins.fill(files);
    this.start.fill(files);
    this.translate();
  }

  translate() {
    if (!this.usual.samplers) return;
    options(at("sampler"), [["", word("ownSampler")], ...this.usual.samplers.map((name) => [name, name])]);
    options(at("schedule"), this.usual.schedules.map((name) => [name === "Automatic" ? "" : name, name]));
    this.plugins.translate();
    this.start.translate();
    this.showBase();
  }

  // What the form asks for.
  async body() {
    const request = { ...this.base };
    for (const name of TEXTS) request[name] = at(name).value;
    for (const name of NUMBERS) request[name] = number(at(name));
    request.steps ??= 30;
    request.seed = at("any-seed").checked ? -1 : number(at("seed")) ?? 0;
    request.sampler = at("sampler").value;
    request.schedule = request.sampler ? at("schedule").value : "";
    request.branch_scale = Number(at("branch_scale").value);
    request.world = at("use-world").checked ? Number(at("world").value) : null;
    request.plugins = [...this.plugins.chosen(), ...await this.start.controls()];
    const mode = await this.start.mode();
    if (mode) request.mode = mode;
    return { request, count: number(at("count")) ?? 1 };
  }

  // Puts a request's settings into the form; gives the names of files that are not here.
  restore(request) {
    this.base = Object.fromEntries(Object.entries(request).filter(([name]) => !SHOWN.includes(name)));
    if (request.model && request.model.hash !== this.usual.model?.hash) this.base.model = request.model;
    if (request.mode && request.mode.name !== "text") this.base.mode = request.mode;
    for (const name of TEXTS) at(name).value = request[name] ?? "";
    for (const name of NUMBERS) at(name).value = request[name] ?? "";
    at("one-box").checked = false;
    this.showBox();
    at("seed").value = request.seed;
    at("any-seed").checked = false;
    at("seed").disabled = false;
    at("sampler").value = request.sampler ?? "";
    at("schedule").value = request.schedule ?? "";
    at("branch_scale").value = request.branch_scale ?? 1;
    at("use-world").checked = request.world !== null && request.world !== undefined;
    at("world").value = request.world ?? 0;
    at("count").value = 1;
    this.start.clear();
    if (at("negative").value || at("negative_en").value) at("negative").closest("details").open = true;
    const controls = (request.plugins ?? []).filter((plugin) => plugin.kind === "controlnet");
    this.start.keepControls(controls);
    this.showNumbers();
    this.showBase();
    return this.plugins.choose((request.plugins ?? []).filter((plugin) => plugin.kind !== "controlnet"));
  }

  // Says what of a restored picture holds beside what the form shows.
  showBase() {
    const usual = { enlarge: 1, english_guidance: null, clip_skip: 1, branch_start: 0, branch_end: 1,
      branch_schedule: "" };
    const told = Object.entries(this.base).filter(([name, value]) =>
      name in usual ? value !== usual[name] : ["mode", "model"].includes(name));
    const place = at("restored");
    place.hidden = !told.length;
    place.textContent = `${word("keeps")} ${told.map(([name, value]) =>
      `${name} ${value?.name ?? value}`).join(", ")} `;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word("forget");
    button.addEventListener("click", () => { this.base = {}; this.showBase(); });
    place.append(button);
  }

  showBox() {
    at("box-part").hidden = !at("one-box").checked;
    if (at("one-box").checked) {
      at("box").value ||= [at("prompt").value, at("prompt_en").value].filter(Boolean).join("，");
      at("box").focus();
    }
    at("split-note").textContent = "";
  }

  splitSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.split(), 250);
  }

  async split() {
    const text = at("box").value;
    const { native, english } = await post("/v1/split", { text });
    if (at("box").value !== text) return;
    at("prompt").value = native;
    at("prompt_en").value = english;
    at("split-note").textContent = "";
  }

  edited() {
    at("split-note").textContent = at("one-box").checked ? word("splitEdited") : "";
  }

  addEnglish(text) {
    const field = at("prompt_en");
    const words = field.value.split(",").map((one) => one.trim()).filter(Boolean);
    if (!words.includes(text)) field.value = [...words, text].join(", ");
    this.edited();
  }

  showNumbers() {
    at("world").disabled = !at("use-world").checked;
    for (const output of document.querySelectorAll("form output[for]")) {
      const slider = at(output.htmlFor[0]);
      output.textContent = slider.disabled ? "–" : Number(slider.value).toString();
    }
  }
}

export function options(select, pairs) {
  const before = select.value;
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

function number(field) {
  return field.value === "" ? null : Number(field.value);
}
