// A picture to start from: shown, painted on for a mask, or used as a ControlNet's condition.

import { options } from "./form.js";
import { send } from "./server.js";
import { word } from "./words.js";

const at = (id) => document.getElementById(id);

export class Start {
  constructor() {
    this.picture = null;
    this.mask = document.createElement("canvas");
    this.painted = false;
    this.cursor = [0, 0];
    this.controlnets = [];
    this.kept = [];
    at("start-file").addEventListener("change", (event) => {
      if (event.target.files[0]) this.load(event.target.files[0]);
      event.target.value = "";
    });
    at("start-clear").addEventListener("click", () => this.clear());
    at("mask-clear").addEventListener("click", () => this.clearMask());
    const canvas = at("start-canvas");
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); this.paint(event); });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons) this.paint(event); });
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  fill(files) {
    this.controlnets = files.filter((file) => file.kind === "controlnet" && file.hash);
  }

  translate() {
    const controls = this.controlnets.map((file) => [file.hash, `${word("controlWith")} ${file.name}`]);
    options(at("control"), [["", word("startPicture")], ...controls]);
    at("start-canvas").setAttribute("aria-label", word("canvas"));
  }

  async load(file) {
    this.picture = await createImageBitmap(file);
    this.kept = [];
    for (const canvas of [at("start-canvas"), this.mask]) {
      canvas.width = this.picture.width;
      canvas.height = this.picture.height;
    }
    this.cursor = [this.picture.width / 2, this.picture.height / 2];
    at("start-edit").hidden = false;
    this.clearMask();
  }

  clear() {
    this.picture = null;
    this.kept = [];
    at("start-edit").hidden = true;
    this.clearMask();
  }

  clearMask() {
    this.painted = false;
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.show();
  }

  // ControlNets of a restored picture, whose conditions are on the server.
  keepControls(controls) {
    this.kept = controls;
  }

  async controls() {
    const hash = at("control").value;
    if (!this.picture || !hash) return this.kept;
    const file = this.controlnets.find((one) => one.hash === hash);
    const picture = await send("/v1/pictures", await this.content());
    const annotator = at("control-canny").checked ? "canny" : null;
    return [{ kind: "controlnet", file: { name: file.file, hash }, picture, annotator,
      strength: Number(at("strength").value) }];
  }

  async mode() {
    if (!this.picture || at("control").value) return null;
    const pictures = { image: await send("/v1/pictures", await this.content()) };
    const settings = { strength: Number(at("strength").value) };
    if (!this.painted) return { name: "image", pictures, settings };
    pictures.mask = await send("/v1/pictures", await this.maskContent());
    return { name: "mask", pictures, settings };
  }

  content() {
    const canvas = blank(this.picture.width, this.picture.height);
    canvas.getContext("2d").drawImage(this.picture, 0, 0);
    return png(canvas);
  }

  maskContent() {
    const canvas = blank(this.mask.width, this.mask.height);
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.mask, 0, 0);
    return png(canvas);
  }

  paint(event) {
    const canvas = at("start-canvas");
    const box = canvas.getBoundingClientRect();
    this.cursor = [(event.clientX - box.left) * canvas.width / box.width,
      (event.clientY - box.top) * canvas.height / box.height];
    this.dot();
  }

  key(event) {
    const step = Math.max(1, this.mask.width / 32);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key === " ") this.dot();
    else if (moves[event.key]) {
      this.cursor = this.cursor.map((place, i) =>
        Math.min(Math.max(0, place + moves[event.key][i]), [this.mask.width, this.mask.height][i]));
      this.show();
    } else return;
    event.preventDefault();
  }

  dot() {
    const context = this.mask.getContext("2d");
    context.fillStyle = "#fff";
    context.beginPath();
    context.arc(...this.cursor, this.radius(), 0, 7);
    context.fill();
    this.painted = true;
    this.show();
  }

  radius() {
    return Number(at("brush").value) / 200 * Math.max(this.mask.width, this.mask.height);
  }

  show() {
    if (!this.picture) return;
    const context = at("start-canvas").getContext("2d");
    context.globalAlpha = 1;
    context.drawImage(this.picture, 0, 0);
    context.globalAlpha = 0.65;
    context.drawImage(this.mask, 0, 0);
    context.globalAlpha = 1;
    context.strokeStyle = "#b3261e";
    context.lineWidth = Math.max(0.5, this.mask.width / 250);
    context.beginPath();
    context.arc(...this.cursor, this.radius(), 0, 7);
    context.stroke();
  }
}

function blank(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

function png(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
