"use strict";
window.onerror = (message) => { document.documentElement.dataset.error = String(message); };
(() => {
  const element = (id) => document.getElementById(id);
  const { ids, pieces, sequences } = JSON.parse(element("data").textContent);
  const MASKED = -1;
  const [T, OPENED, TOKENS, REMASKED, ESS, LOG_Z, ENERGY, CANDIDATES] = [0, 1, 2, 3, 4, 5, 6, 7]; // of a frame
  const box = element("tokens"), slider = element("step"), play = element("play"), speed = element("speed");
  let sequence = 0, step = 0, timer = 0, spans = [], state = null, panels = [];

  // --- the state after a step -------------------------------------------------------------------------------------------------

  function stateAt(number) {
    const { start, frames } = sequences[sequence];
    const tokens = start.slice(), opened = start.map(() => 0); // by which step a position got its token; 0: from the start
    for (let n = 1; n <= number; n++) {
      const frame = frames[n - 1];
      frame[OPENED].forEach((position, i) => { tokens[position] = frame[TOKENS][i]; opened[position] = n; });
      for (const position of frame[REMASKED]) { tokens[position] = MASKED; opened[position] = n; }
    }
    return { tokens, opened };
  }

  function prepare() { // once for each sequence: its end, and the texts that several of its positions have only together
    const one = sequences[sequence];
    if (one.end) return;
    one.end = stateAt(one.frames.length).tokens;
    const text = one.end.map((token) => (token === MASKED ? "" : pieces[token]));
    for (const [first, count, joined] of one.joins) {
      text[first] = joined;
      for (let i = 1; i < count; i++) text[first + i] = "";
    }
    // A hole is as wide as what will fill it and breaks where that will, so that the text stays in place while it is played.
    one.holes = text.map((t) => Array.from(t || " ", (c) => (c === "\n" ? "\u00b7\n" : /\s/.test(c) ? "\u00b7\u200b" : "\u00b7")).join(""));
    one.masked = [one.start.filter((token) => token === MASKED).length];
    for (let n = 1, left = one.masked[0], tokens = one.start.slice(); n <= one.frames.length; n++) {
      const frame = one.frames[n - 1];
      frame[OPENED].forEach((position, i) => { left -= tokens[position] === MASKED; tokens[position] = frame[TOKENS][i]; });
      for (const position of frame[REMASKED]) { left += tokens[position] !== MASKED; tokens[position] = MASKED; }
      one.masked.push(left);
    }
  }

  // --- tokens -----------------------------------------------------------------------------------------------------------------

  function build() {
    box.textContent = "";
    spans = sequences[sequence].start.map((_, position) => {
      const span = document.createElement("span");
      span.dataset.position = position;
      span.dataset.hole = sequences[sequence].holes[position];
      box.append(span);
      return span;
    });
  }

  function draw() {
    const { frames, end, joins } = sequences[sequence];
    state = stateAt(step);
    const text = state.tokens.map((token) => (token === MASKED ? "" : pieces[token]));
    const continued = new Set();
    for (const [first, count, joined] of joins) {
      let complete = true;
      for (let i = first; i < first + count; i++) complete &&= state.tokens[i] === end[i];
      if (!complete) continue;
      text[first] = joined;
      for (let i = first + 1; i < first + count; i++) { text[i] = ""; continued.add(i); }
    }
    spans.forEach((span, i) => {
      const number = state.opened[i], now = step > 0 && number === step;
      let name = "";
      if (state.tokens[i] === MASKED) name = now ? "masked lost" : "masked";
      else {
        name = number === 0 ? "prompt" : now ? "open now" : "open";
        if (text[i].includes("\n")) name += " newline";
        else if (text[i] === "" && !continued.has(i)) name += " empty";
        if (/[\u202a-\u202e\u2066-\u2069]/.test(text[i])) name += " turning"; // it turns its own text, not what follows
        if (number) span.style.setProperty("--age", `${Math.round((100 * (number - 1)) / Math.max(1, frames.length - 1))}%`);
      }
      if (span.className !== name) span.className = name;
      if (span.textContent !== text[i]) span.textContent = text[i];
    });
  }

  box.addEventListener("pointerover", (event) => {
    const position = event.target.dataset.position;
    if (position === undefined) return;
    const token = state.tokens[position], number = state.opened[position];
    const when = token === MASKED ? "masked" : number ? `opened at step ${number}` : "prompt";
    event.target.title = `position ${position}, ${when}` + (token === MASKED ? "" : `, token ${ids[token]}`);
  });

  // --- words ------------------------------------------------------------------------------------------------------------------

  const known = (value) => value !== null && Number.isFinite(Number(value));
  const show = (value, digits = 3) => {
    if (value === null || value === undefined) return "none";
    value = Number(value);
    if (!Number.isFinite(value)) return value > 0 ? "\u221e" : "\u2212\u221e";
    const size = Math.abs(value);
    const text = size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toFixed(size >= 100 ? 1 : size >= 10 ? Math.min(2, digits) : digits)));
    return text.replace("-", "\u2212");
  };

  function describe() {
    const { frames, masked } = sequences[sequence];
    if (step === 0) return `start, before step 1 of ${frames.length}, ${masked[0]} of ${spans.length} positions masked`;
    const frame = frames[step - 1];
    const words = [`step ${step} of ${frames.length}`, `t = ${show(frame[T])}`, `opened ${frame[OPENED].length}`];
    if (frame[REMASKED].length) words.push(`masked again ${frame[REMASKED].length}`);
    if (frame[ESS] !== null) words.push(`ESS ${Number(frame[ESS]).toFixed(2)}` + (frame[CANDIDATES] ? ` of ${frame[CANDIDATES]}` : ""));
    if (frame[ENERGY] !== null) words.push(`energy ${show(frame[ENERGY], 2)} nats`);
    if (frame[LOG_Z] !== null) words.push(`log Z ${show(frame[LOG_Z], 2)} nats`);
    return words.join(", ");
  }

  // --- charts -----------------------------------------------------------------------------------------------------------------

  const KINDS = [
    { title: "Masked positions", unit: "positions", zero: true, value: (one, n) => one.masked[n], from: 0 },
    { title: "Effective sample size", unit: "candidates", zero: true, value: (one, n) => one.frames[n - 1][ESS], from: 1, digits: 2,
      top: (one) => Math.max(0, ...one.frames.map((f) => f[CANDIDATES])) },
    { title: "Energy of the candidate taken", unit: "nats", value: (one, n) => one.frames[n - 1][ENERGY], from: 1 },
    { title: "log Z, from the mean weight", unit: "nats", value: (one, n) => one.frames[n - 1][LOG_Z], from: 1 },
  ];

  function svg(name, attributes, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function ticks(low, high, count, whole) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    let size = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
    if (whole) size = Math.max(1, Math.round(size));
    const found = [];
    for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++) found.push(Number((i * size).toPrecision(12)));
    return found;
  }

  function chart(kind) {
    const one = sequences[sequence], last = one.frames.length, points = [];
    for (let n = kind.from; n <= last; n++) points.push([n, kind.value(one, n)]);
    const values = points.filter(([, v]) => known(v)).map(([, v]) => Number(v));
    if (!values.length) return null;

    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const heading = document.createElement("h2"), reading = document.createElement("span");
    heading.textContent = kind.title;
    reading.className = "reading";
    caption.append(heading, reading);
    figure.append(caption);
    element("charts").append(figure);

    const width = Math.max(220, figure.clientWidth - 24), height = 150, left = 58, right = 12, top = 8, bottom = 34;
    let low = kind.zero ? 0 : Math.min(...values), high = Math.max(...values, kind.top ? kind.top(one) : -Infinity);
    if (high === low) { low -= kind.zero ? 0 : 1; high += 1; }
    const x = (n) => left + ((width - left - right) * n) / Math.max(1, last);
    const y = (v) => top + ((height - top - bottom) * (high - v)) / (high - low);
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img",
      "aria-label": `${kind.title} in ${kind.unit} against the step: from ${show(Math.min(...values))} to ${show(Math.max(...values))}` });
    for (const v of ticks(low, high, 4)) {
      picture.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }));
      picture.append(svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, show(v)));
    }
    for (const n of ticks(0, Math.max(1, last), Math.min(6, width / 70), true))
      picture.append(svg("text", { x: x(n), y: height - bottom + 15, "text-anchor": "middle" }, String(n)));
    picture.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "step"));
    const middle = (top + height - bottom) / 2;
    picture.append(svg("text", { x: 11, y: middle, "text-anchor": "middle", transform: `rotate(-90 11 ${middle})` }, kind.unit));

    let path = "", pen = false;
    for (const [n, v] of points) {
      if (known(v)) path += `${pen ? "L" : "M"}${x(n).toFixed(1)} ${y(v).toFixed(1)}`;
      pen = known(v);
    }
    picture.append(svg("path", { class: "curve", d: path }));
    if (values.length <= 64)
      for (const [n, v] of points) if (known(v)) picture.append(svg("circle", { class: "dot", cx: x(n), cy: y(v), r: 2.2 }));
    const hair = svg("line", { class: "hair", y1: top, y2: height - bottom, visibility: "hidden" });
    const mark = svg("line", { class: "mark", y1: top, y2: height - bottom });
    const dot = svg("circle", { class: "mark-dot", r: 4.5 });
    picture.append(hair, mark, dot);
    figure.append(picture);

    const value = (n) => (n < kind.from ? null : kind.value(one, n));
    const read = (n) => {
      const t = n > 0 ? `, t = ${show(one.frames[n - 1][T])}` : "";
      const words = known(value(n)) && kind.digits ? Number(value(n)).toFixed(kind.digits) : show(value(n));
      reading.textContent = `step ${n}${t}: ${words}` + (value(n) === null ? "" : ` ${kind.unit}`);
    };
    const stepUnder = (event) => {
      const frame = picture.getBoundingClientRect();
      const at = ((event.clientX - frame.left) * width) / frame.width;
      return Math.min(last, Math.max(0, Math.round(((at - left) * Math.max(1, last)) / (width - left - right))));
    };
    const update = () => {
      mark.setAttribute("x1", x(step));
      mark.setAttribute("x2", x(step));
      const here = value(step);
      dot.setAttribute("visibility", known(here) ? "visible" : "hidden");
      if (known(here)) { dot.setAttribute("cx", x(step)); dot.setAttribute("cy", y(here)); }
      read(step);
    };
    picture.addEventListener("pointermove", (event) => {
      const n = stepUnder(event);
      hair.setAttribute("x1", x(n));
      hair.setAttribute("x2", x(n));
      hair.setAttribute("visibility", "visible");
      read(n);
    });
    picture.addEventListener("pointerleave", () => { hair.setAttribute("visibility", "hidden"); read(step); });
    picture.addEventListener("click", (event) => { pause(); go(stepUnder(event)); });
    return update;
  }

  function charts() {
    element("charts").textContent = "";
    panels = KINDS.map(chart).filter(Boolean);
    if (panels.length < 2 && sequences[sequence].frames.length) {
      const note = document.createElement("p");
      note.className = "none";
      note.textContent = "No energy was used, so there is no effective sample size, energy or log Z to show.";
      element("charts").append(note);
    }
  }

  // --- moving -----------------------------------------------------------------------------------------------------------------

  function go(number, remember = true) {
    const last = sequences[sequence].frames.length;
    step = Math.min(last, Math.max(0, number));
    slider.value = step;
    draw();
    const words = describe();
    element("status").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    element("previous").disabled = step === 0;
    element("next").disabled = step === last;
    for (const update of panels) update();
    if (!remember || timer) return; // browsers limit how often an address may change: not while playing
    try { history.replaceState(null, "", `#sequence=${sequence}&step=${step}`); } catch { /* a frame without an address of its own */ }
  }

  function choose(index) {
    sequence = index;
    prepare();
    const one = sequences[sequence];
    slider.max = one.frames.length;
    play.disabled = slider.disabled = one.frames.length === 0;
    element("sequence").value = index;
    element("prompt-key").hidden = !one.start.some((token) => token !== MASKED);
    element("lost-key").hidden = !one.frames.some((frame) => frame[REMASKED].length);
    document.querySelectorAll(".plain").forEach((plain, i) => { plain.hidden = i !== index; });
    build();
    charts();
  }

  function pause() {
    if (!timer) return;
    clearTimeout(timer);
    timer = 0;
    play.textContent = "Play";
    element("status").setAttribute("aria-live", "polite");
    go(step);
  }

  function start() {
    const last = sequences[sequence].frames.length;
    const tick = () => {
      go(step + 1);
      if (step >= last) pause();
      else timer = setTimeout(tick, 1000 / Number(speed.value));
    };
    play.textContent = "Pause";
    element("status").setAttribute("aria-live", "off");
    timer = setTimeout(tick, step >= last ? 500 : 0);
    if (step >= last) go(0);
  }

  function address() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const whole = (name) => (/^\d+$/.test(wanted.get(name) ?? "") ? Number(wanted.get(name)) : null);
    const index = Math.min(sequences.length - 1, whole("sequence") ?? 0);
    choose(index);
    go(whole("step") ?? sequences[index].frames.length, false);
  }

  const toggle = () => (timer ? pause() : start());
  const move = (number) => { pause(); go(number); };
  play.addEventListener("click", toggle);
  element("previous").addEventListener("click", () => move(step - 1));
  element("next").addEventListener("click", () => move(step + 1));
  slider.addEventListener("input", () => move(Number(slider.value)));
  element("sequence").addEventListener("change", (event) => {
    pause();
    choose(Number(event.target.value));
    go(sequences[sequence].frames.length);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || play.disabled) return;
    const at = event.target.tagName, slides = event.target === slider;
    if (at === "SELECT" || (at === "INPUT" && !slides)) return;
    if (event.key === " " && at !== "BUTTON" && at !== "SUMMARY") toggle();
    else if (event.key === "ArrowLeft") move(step - 1);
    else if (event.key === "ArrowRight") move(step + 1);
    else if (event.key === "Home" && slides) move(0);
    else if (event.key === "End" && slides) move(Number(slider.max));
    else return;
    event.preventDefault();
  });
  window.addEventListener("hashchange", () => { pause(); address(); });
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar comes and goes
    width = window.innerWidth;
    charts();
    for (const update of panels) update();
  });

  const longest = Math.max(...sequences.map((one) => one.frames.length));
  speed.value = ["1", "2", "5", "10", "25", "50"].find((s) => longest / s <= 12) ?? "50"; // the whole of it within some seconds
  element("player").hidden = false;
  element("plain").open = false;
  address();
  document.documentElement.dataset.ready = "true";
})();
