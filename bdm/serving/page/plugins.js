// Cards of the files in the folders of models.

import { show } from "./server.js";
import { word } from "./words.js";

const KINDS = ["checkpoint", "vae", "adapter", "embedding"];

export class Plugins {
  constructor(say) {
    this.say = say;
    this.files = [];
    this.used = new Map();
  }

  fill(files) {
    this.files = files.filter((file) => KINDS.includes(file.kind) && file.hash);
    this.translate();
  }

  translate() {
    const list = document.getElementById("plugins");
    list.replaceChildren(...this.files.map((file) => this.card(file)));
    document.getElementById("plugins-help").textContent =
      word(this.files.length ? "somePlugins" : "noPlugins");
  }

  // What is in use, as a request says it.
  chosen() {
    return [...this.used.values()];
  }

  // Uses what a request uses; gives the names of what is not here.
  choose(plugins) {
    this.used.clear();
    const missing = [];
    for (const plugin of plugins) {
      const file = this.files.find((one) => one.hash === plugin.file.hash);
      if (file) this.used.set(file.hash, plugin);
      else missing.push(plugin.file.name);
    }
    if (this.used.size) document.getElementById("plugins-part").open = true;
    this.translate();
    return missing;
  }

  card(file) {
    const item = document.createElement("li");
    const used = this.used.get(file.hash);
    item.classList.toggle("used", Boolean(used));
    if (file.preview) {
      const image = new Image();
      image.alt = "";
      show(image, file.preview);
      item.append(image);
    }
    item.append(paragraph("name", file.name), paragraph("help", [file.kind, file.base].filter(Boolean).join(", ")));
    item.append(this.words(file), this.toggle(file, used));
    if (used && file.kind === "adapter") item.append(this.slider(file, used));
    return item;
  }

  words(file) {
    const group = document.createElement("div");
    group.className = "words";
    for (const text of file["trigger words"].split(",").map((one) => one.trim()).filter(Boolean).slice(0, 12)) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => this.say(text));
      group.append(button);
    }
    return group;
  }

  toggle(file, used) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word(used ? "inUse" : "useIt");
    button.setAttribute("aria-pressed", String(Boolean(used)));
    button.setAttribute("aria-label", `${button.textContent}: ${file.name}`);
    button.addEventListener("click", () => {
      if (used) this.used.delete(file.hash);
      else this.used.set(file.hash, { kind: file.kind, name: file.name, file: { name: file.file, hash: file.hash } });
      this.translate();
      document.querySelector(`#plugins [aria-label$=": ${CSS.escape(file.name)}"]`)?.focus();
    });
    return button;
  }

  slider(file, used) {
    const row = document.createElement("div");
    row.className = "slider";
    const input = document.createElement("input");
    const output = document.createElement("output");
    Object.assign(input, { type: "range", min: -1, max: 2, step: 0.05, value: used.strength ?? 1 });
    input.setAttribute("aria-label", `${file.name}: ${word("pluginStrength")}`);
    const tell = () => {
      used.strength = Number(input.value);
      delete used.text_strength;
      output.textContent = input.value;
    };
    input.addEventListener("input", tell);
    output.textContent = input.value;
    row.append(input, output);
    return row;
  }
}

function paragraph(kind, text) {
  const element = document.createElement("p");
  element.className = kind;
  element.textContent = text;
  return element;
}
