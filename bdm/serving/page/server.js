// Calls of the server: JSON, pictures, and streams of events.

import { word } from "./words.js";

const key = () => sessionStorage.getItem("bdm-key") || "";

export class Refused extends Error {}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers["X-API-Key"] = key();
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(word("unreachable"));
  }
  if (answer.status === 401) {
    await askKey();
    return call(path, options);
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Refused(said.detail || `HTTP ${answer.status}`);
  }
  return answer;
}

let asking = null;

function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.querySelector("#ask-key");
    dialog.showModal();
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("bdm-key", document.querySelector("#key").value.trim());
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

export async function get(path) {
  return (await call(path)).json();
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await call(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

export async function send(path, blob) {
  return (await call(path, { method: "POST", body: blob })).json();
}

export async function remove(path) {
  return (await call(path, { method: "DELETE" })).json();
}

// Pictures are asked for with the key, which an address in src cannot carry.
export async function show(image, path) {
  const settle = () => image.classList.toggle("tiny", image.naturalWidth < 200);
  image.addEventListener("load", settle);
  if (!key()) {
    image.src = path;
    return;
  }
  const answer = await call(path);
  image.src = URL.createObjectURL(await answer.blob());
}

// Draw: gives each event as [name, content] while the pictures come along; leaving the loop frees their places.
export async function* drawing(body, signal) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const answer = await call("/v1/jobs", { method: "POST", headers, body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    kept += value;
    const blocks = kept.split("\n\n");
    kept = blocks.pop();
    for (const block of blocks) {
      const found = /^event: (.*)\ndata: (.*)$/.exec(block);
      if (found) yield [found[1], JSON.parse(found[2])];
    }
  }
}
