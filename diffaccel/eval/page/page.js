"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** Two videos of one prompt and seed in step: played, paused and sought together, beside or over each other. */
class Player {
  constructor(root) {
    const find = (name) => root.querySelector("." + name);
    this.root = root;
    this.article = root.closest("article");
    this.units = JSON.parse(find("units").textContent);
    this.urls = new Map();
    this.videos = [find("a"), find("b")];
    this.sides = [find("left"), find("right")];
    for (const name of ["unit", "stage", "wipe", "wipes", "edge", "play", "frame", "count", "rate", "trouble"]) {
      this[name] = find(name);
    }
    this.frames = 1;
    this.unit.addEventListener("change", () => this.choose());
    this.sides.forEach((side) => side.addEventListener("change", () => this.load()));
    this.play.addEventListener("click", () => this.toggle());
    this.frame.addEventListener("input", () => this.seek(Number(this.frame.value)));
    this.rate.addEventListener("change", () => this.setRate());
    this.wipes.addEventListener("change", () => this.setWipe());
    this.edge.addEventListener("input", () => this.setWipe());
    this.stage.addEventListener("pointerdown", (event) => this.drag(event));
    this.stage.addEventListener("pointermove", (event) => event.buttons && this.drag(event));
    root.addEventListener("keydown", (event) => this.key(event));
    this.videos.forEach((video) => {
      video.addEventListener("ended", () => this.pause());
      video.addEventListener("error", () => this.complain());
      video.addEventListener("loadeddata", () => this.seek(Number(this.frame.value)));
    });
    this.choose();
  }

  choose() {
    const unit = this.units[Number(this.unit.value)];
    const before = this.sides.map((side) => side.value);
    const names = unit.videos.map((video) => video.name);
    this.sides.forEach((side, number) => {
      side.replaceChildren(...names.map((name) => new Option(name, name)));
      side.value = names.includes(before[number]) ? before[number] : names[Math.min(number, names.length - 1)];
    });
    this.frames = unit.frames;
    this.frame.max = unit.frames - 1;
    this.frame.value = 0;
    const all = [...this.article.querySelectorAll(".of-unit")];
    all.forEach((part) => (part.hidden = part.dataset.unit !== this.unit.value));
    const none = this.article.querySelector(".no-curves");
    if (none) none.hidden = all.some((part) => !part.hidden);
    this.load();
  }

  load() {
    this.pause();
    this.trouble.hidden = true;
    const unit = this.units[Number(this.unit.value)];
    this.sides.forEach((side, number) => {
      const video = unit.videos.find((one) => one.name === side.value);
      this.videos[number].parentElement.querySelector(".name").textContent = video ? video.name : "no video";
      if (video) this.videos[number].src = this.address(video);
    });
    this.setRate();
  }

  address(video) {
    if ("href" in video) return video.href;
    if (!this.urls.has(video.clip)) {
      const text = atob(document.getElementById("clip-" + video.clip).textContent);
      const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
      this.urls.set(video.clip, URL.createObjectURL(new Blob([bytes], { type: "video/mp4" })));
    }
    return this.urls.get(video.clip);
  }

  complain() {
    const failed = this.videos.find((video) => video.error);
    if (!failed) return;
    this.trouble.textContent = "This video cannot be played: it lies beside the page and was not found, or this "
      + "browser has no H.264.";
    this.trouble.hidden = false;
  }

  get seconds() {
    const length = this.videos[0].duration;
    return Number.isFinite(length) ? length / this.frames : 1 / 16;
  }

  get now() {
    return Math.max(0, Math.min(this.frames - 1, Math.floor(this.videos[0].currentTime / this.seconds + 1e-4)));
  }

  toggle() {
    if (this.play.getAttribute("aria-pressed") === "true") this.pause();
    else this.start();
  }

  async start() {
    if (this.now >= this.frames - 1) this.seek(0);
    this.shown(true);
    const starts = this.videos.map((video) => video.play());
    await Promise.allSettled(starts);
    this.follow();
  }

  pause() {
    if (this.play.getAttribute("aria-pressed") !== "true") return;
    this.shown(false);
    this.videos.forEach((video) => video.pause());
    this.seek(this.now);
  }

  shown(playing) {
    this.play.setAttribute("aria-pressed", String(playing));
    this.play.textContent = playing ? "Pause" : "Play";
  }

  /** While they play: the second runs a little faster or slower until it is where the first is. */
  follow() {
    if (this.play.getAttribute("aria-pressed") !== "true") return;
    const [first, second] = this.videos;
    const ahead = (second.currentTime - first.currentTime) / this.seconds;
    const rate = Number(this.rate.value);
    if (Math.abs(ahead) > 2) second.currentTime = first.currentTime;
    second.playbackRate = rate * (1 - Math.max(-0.1, Math.min(0.1, ahead * 0.1)));
    this.tell();
    requestAnimationFrame(() => this.follow());
  }

  seek(frame) {
    const to = Math.max(0, Math.min(this.frames - 1, frame));
    this.videos.forEach((video) => (video.currentTime = (to + 0.5) * this.seconds));
    this.tell(to);
  }

  tell(frame = this.now) {
    this.frame.value = frame;
    this.count.textContent = `${frame + 1} of ${this.frames}`;
    for (const figure of this.article.querySelectorAll(".of-unit:not([hidden]) .chart")) {
      if (figure.reader) figure.reader.at(frame);
    }
  }

  setRate() {
    this.videos.forEach((video) => (video.playbackRate = Number(this.rate.value)));
  }

  setWipe() {
    const wiped = this.wipes.checked;
    this.stage.classList.toggle("wiped", wiped);
    this.wipe.hidden = !wiped;
    this.stage.style.setProperty("--edge", `${this.edge.value}%`);
    this.videos[1].style.clipPath = wiped ? `inset(0 0 0 ${this.edge.value}%)` : "";
  }

  drag(event) {
    if (!this.wipes.checked) return;
    const box = this.stage.getBoundingClientRect();
    this.edge.value = Math.round((100 * (event.clientX - box.left)) / box.width);
    this.setWipe();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, input[type=range]")) return;
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (event.key === " " && !event.target.closest("button, input")) this.toggle();
    else if (event.key in steps) {
      this.pause();
      this.seek(this.now + steps[event.key]);
    } else if (event.key.toLowerCase() === "w") {
      this.wipes.checked = !this.wipes.checked;
      this.setWipe();
    } else return;
    event.preventDefault();
  }
}

function draw(parent, tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
}

/** What is under the pointer, or where the arrow keys have gone, in words below a chart. */
class Reader {
  constructor(figure) {
    this.svg = figure.querySelector("svg[tabindex]");
    this.output = figure.querySelector("output");
    this.cursor = figure.querySelector(".cursor");
    this.number = -1;
    this.svg.addEventListener("pointermove", (event) => this.point(this.place(event)));
    this.svg.addEventListener("pointerdown", (event) => this.point(this.place(event)));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  place(event) {
    const box = this.svg.getBoundingClientRect();
    const scale = this.svg.viewBox.baseVal.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }
}

class LineReader extends Reader {
  constructor(figure) {
    super(figure);
    this.data = JSON.parse(figure.dataset.chart);
    this.values = [...figure.querySelectorAll(".legend strong")];
    const all = this.data.series.flatMap((series) => series.points.map((point) => point[0]));
    this.stops = [...new Set(all)].sort((a, b) => a - b);
  }

  point([x]) {
    const gaps = this.stops.map((stop) => Math.abs(stop - x));
    this.show(gaps.indexOf(Math.min(...gaps)));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    this.show(Math.max(0, Math.min(this.stops.length - 1, this.number + steps[event.key])));
  }

  /** Where x, as it is written, is that number. */
  at(value) {
    for (const series of this.data.series) {
      const found = series.points.find((point) => Number(point[2]) === value);
      if (found) return this.show(this.stops.indexOf(found[0]));
    }
    return undefined;
  }

  show(number) {
    this.number = number;
    const x = this.stops[number];
    const { top, bottom } = this.data;
    this.cursor.replaceChildren();
    draw(this.cursor, "line", { x1: x, x2: x, y1: top, y2: bottom });
    const [said, noted] = [[], []];
    let where = "";
    this.data.series.forEach((series, index) => {
      this.values[index].textContent = "";
      for (const [px, py, xs, ys, note] of series.points) {
        if (px !== x) continue;
        where = xs;
        draw(this.cursor, "circle", { cx: px, cy: py, r: 4 });
        this.values[index].textContent = ys;
        if (note) noted.push(`${note}: ${ys}`);
        else said.push(`${series.name}: ${ys}`);
      }
    });
    const heard = Object.assign(document.createElement("span"), { className: "heard", textContent: said.join("; ") });
    this.output.replaceChildren([`${this.data.x} ${where}`, ...noted].join("; ") + " ", heard);
  }
}

class HeatReader extends Reader {
  constructor(figure) {
    super(figure);
    this.cells = [...figure.querySelectorAll("rect[data-said]")];
    this.columns = 1 + Math.max(...this.cells.map((cell) => Number(cell.dataset.column)));
  }

  point([x, y]) {
    this.show(this.cells.findIndex((cell) => {
      const box = cell.getBBox();
      return x >= box.x && x <= box.x + box.width + 1 && y >= box.y && y <= box.y + box.height + 2;
    }));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const to = this.number < 0 ? 0 : this.number + steps[event.key];
    if (to >= 0 && to < this.cells.length) this.show(to);
  }

  show(number) {
    if (number < 0) return;
    this.number = number;
    const cell = this.cells[number];
    this.cursor.replaceChildren();
    const box = Object.fromEntries(["x", "y", "width", "height"].map((name) => [name, cell.getAttribute(name)]));
    draw(this.cursor, "rect", box);
    this.output.textContent = cell.dataset.said;
  }
}

for (const figure of document.querySelectorAll("figure.chart")) {
  figure.reader = figure.classList.contains("heat") ? new HeatReader(figure) : new LineReader(figure);
}
for (const player of document.querySelectorAll(".player")) new Player(player);
