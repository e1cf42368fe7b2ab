// Answers a pointer on the page of a run: which token, layer and head looks where.
//
// Each sample's attention stands in the JSON tag, as page.py's `maps` wrote it: a byte for each place of a map, 255
// being the largest value of that token, layer and head, which stands beside it as a float. A view is what is drawn
// now: {token, layer, head}, 0 of layer and head being the mean. The address names it, so that a link leads to it:
//     page.html#sample=1&token=3&layer=2&head=0
"use strict";

const samples = JSON.parse(document.getElementById("numbers").textContent);

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

for (const sample of samples) {
  for (const path of sample.paths) {
    path.image = bytes(path.image);
    path.latents = bytes(path.latents);
    path.peak = new Float32Array(bytes(path.peak).buffer);
    path.longest = new Float32Array(bytes(path.longest).buffer);
    path.share = new Uint16Array(bytes(path.share).buffer);
  }
}

function percent(share) {
  return share > 0 && share < 0.0005 ? "under 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

// The number of a token, layer and head among all of a sample's maps.
function place(sample, view) {
  const [, layers, heads] = sample.sizes;
  return (view.token * layers + view.layer) * heads + view.head;
}

// A map's weights: of a sample's path, `size` of them, from its bytes and its largest value.
function weights(packed, largest, at, size) {
  return Array.from(packed.subarray(at * size, (at + 1) * size), (byte) => (byte / 255) * largest[at]);
}

function draw(section, view) {
  const sample = samples[section.dataset.sample];
  const at = place(sample, view);
  const [rows, columns] = sample.grid;
  const pictures = sample.paths.map((path) => weights(path.image, path.peak, at, rows * columns));
  const latents = sample.paths.map((path) => weights(path.latents, path.longest, at, sample.count));
  const longest = Math.max(1e-12, ...latents.flat()); // both paths' bars have one scale, each picture its own

  for (const figure of section.querySelectorAll(".path")) {
    const p = Number(figure.dataset.path);
    const path = sample.paths[p];
    const peak = Math.max(1e-12, ...pictures[p]);
    figure.classList.toggle("copied", p > 0 && sample.copied[view.token]);

    figure.querySelectorAll(".veil rect").forEach((rect, i) => {
      const veil = sample.darkest * (1 - pictures[p][i] / peak);
      rect.setAttribute("fill-opacity", veil.toFixed(3));
    });
    figure.querySelectorAll("svg.bars rect").forEach((rect, i) => {
      const tall = (40 * latents[p][i]) / longest;
      rect.setAttribute("height", tall.toFixed(2));
      rect.setAttribute("y", (40 - tall).toFixed(2));
    });

    const fill = {
      image: percent(path.share[2 * at] / 65535),
      latents: percent(path.share[2 * at + 1] / 65535),
      peak: percent(peak),
      longest: percent(longest),
    };
    for (const svg of figure.querySelectorAll(".heads")) {
      fill[`most-${svg.dataset.target}`] = percent(shade(svg, sample, p, view));
    }
    for (const [name, text] of Object.entries(fill)) {
      const cell = figure.querySelector(`[data-fill="${name}"]`);
      if (cell) cell.textContent = text;
    }
  }
}

// Colours a grid of layers by heads for the view's token -> the share that is darkest, of both paths.
function shade(svg, sample, p, view) {
  const target = svg.dataset.target === "latents" ? 1 : 0;
  const share = (path, layer, head) => path.share[2 * place(sample, { ...view, layer, head }) + target] / 65535;
  const [, layers, heads] = sample.sizes;
  let darkest = 1e-12;
  for (const path of sample.paths) {
    for (let layer = 0; layer < layers; layer++) {
      for (let head = 0; head < heads; head++) darkest = Math.max(darkest, share(path, layer, head));
    }
  }

  for (const cell of svg.querySelectorAll("rect")) {
    const layer = Number(cell.dataset.layer);
    const head = Number(cell.dataset.head);
    cell.setAttribute("fill-opacity", (share(sample.paths[p], layer, head) / darkest).toFixed(3));
    cell.classList.toggle("at", layer === view.layer && head === view.head);
  }
  return darkest;
}

// A sample's controls: what is chosen stays, what is pointed at is drawn while the pointer is there.
function listen(section, index) {
  const sample = samples[index];
  const chosen = { token: 0, layer: 0, head: 0 };
  const selects = [...section.querySelectorAll("select")];
  const pointed = section.querySelector(".pointed");

  function choose(changes) {
    Object.assign(chosen, changes);
    for (const select of selects) select.value = chosen[select.dataset.choose];
    draw(section, chosen);
  }

  function remember() {
    const view = Object.entries(chosen).map(([name, value]) => `${name}=${value}`);
    history.replaceState(null, "", `#sample=${index + 1}&${view.join("&")}`);
  }

  for (const select of selects) {
    select.addEventListener("change", () => {
      choose({ [select.dataset.choose]: Number(select.value) });
      remember();
    });
  }
  section.querySelector("button").addEventListener("click", () => {
    choose({ layer: 0, head: 0 });
    remember();
  });

  for (const cell of section.querySelectorAll(".heads rect")) {
    const view = { layer: Number(cell.dataset.layer), head: Number(cell.dataset.head) };
    const name = (kind, numbers, i) => (i ? `${kind} ${numbers[i - 1]}` : `all ${kind}s`);
    cell.addEventListener("pointerenter", () => {
      draw(section, { ...chosen, ...view });
      pointed.textContent = `${name("layer", sample.layers, view.layer)}, ${name("head", sample.heads, view.head)}`;
    });
    cell.addEventListener("pointerleave", () => {
      draw(section, chosen);
      pointed.textContent = "\u00a0";
    });
    cell.addEventListener("click", () => {
      choose(view);
      remember();
    });
  }

  // Places of the picture: the same one in both, with what each path gives it.
  const veils = [...section.querySelectorAll(".veil")].map((veil) => [...veil.querySelectorAll("rect")]);
  const [rows, columns] = sample.grid;
  veils.flat().forEach((rect, n) => {
    const i = n % (rows * columns);
    rect.addEventListener("pointerenter", () => {
      const at = place(sample, chosen);
      const told = sample.paths.map((path) => percent((path.image[at * rows * columns + i] / 255) * path.peak[at]));
      const names = told.length > 1 ? ["intact", "corrupted"] : ["of the attention"];
      const said = told.map((share, p) => (p > 0 && sample.copied[chosen.token] ? null : `${share} ${names[p]}`));
      pointed.textContent =
        `row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}: ${said.filter(Boolean).join(", ")}`;
      for (const veil of veils) veil[i].classList.add("at");
    });
    rect.addEventListener("pointerleave", () => {
      pointed.textContent = "\u00a0";
      for (const veil of veils) veil[i].classList.remove("at");
    });
  });
  return choose;
}

const choosers = [...document.querySelectorAll(".sample")].map(listen);
choosers.forEach((choose) => choose({}));

// What the address names is drawn, where there is such a view.
const named = new URLSearchParams(location.hash.slice(1));
const number = Number(named.get("sample"));
if (samples[number - 1]) {
  const limit = samples[number - 1].sizes;
  const view = {};
  ["token", "layer", "head"].forEach((name, axis) => {
    const value = Number(named.get(name));
    if (Number.isInteger(value) && value >= 0 && value < limit[axis]) view[name] = value;
  });
  choosers[number - 1](view);
  document.querySelectorAll(".sample")[number - 1].scrollIntoView();
}
