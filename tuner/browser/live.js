// What all pages share: asking again and again, building elements, saying numbers and times.

/** Ask for `url()` every `seconds` while the page is seen, and hand what is new to `show`. */
export function poll(url, seconds, show) {
  const problem = document.getElementById("problem");
  const main = document.getElementById("main");
  let tag = "";
  let waits = 0;
  let timer = 0;
  async function ask() {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const answer = await fetch(url(), { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
      if (answer.status === 401) return location.reload(); // the session has ended: the server asks for the password
      const text = await answer.text();
      if (answer.status !== 304) {
        const content = JSON.parse(text);
        if (!answer.ok) throw new Error(content.reason);
        tag = answer.headers.get("ETag") || "";
        show(content);
      }
      problem.hidden = true;
      waits = 0;
    } catch (error) {
      waits = Math.min(waits + 1, 5);
      problem.textContent = `Not up to date: ${error.message}. Trying again.`;
      problem.hidden = false;
    }
    main.setAttribute("aria-busy", "false");
    timer = setTimeout(ask, seconds * 1000 * 2 ** waits);
  }
  document.addEventListener("visibilitychange", ask);
  ask();
}

/** An element; attributes that are null are left out, children are elements or text. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  return fill(element, ...children);
}

/** Put children, elements or text, in the place of what is there; null is nothing. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** A table that scrolls sideways in its card. Columns are [title, "number"?]; cells elements or text. */
export function table(columns, rows) {
  const kind = (i) => ({ class: columns[i][1] || null });
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, columns.map(([title], i) => el("th", { scope: "col", ...kind(i) }, title)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) => el("td", kind(i), cell ?? "–")))))));
}

export function chip(word) {
  return el("span", { class: `chip ${word}` }, word);
}

export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", { class: "facts" }, shown.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return null;
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? Number(value.toPrecision(digits)).toString() : value.toExponential(digits - 1);
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return null;
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.round(s / 86400)} days`;
}

export function ago(time, now) {
  return time === null || time === undefined ? null : `${duration(now - time)} ago`;
}

export const studyPath = (study) => `/tuner/studies/${encodeURIComponent(study)}`;
export const trialPath = (study, trial) => `${studyPath(study)}/trials/${trial}`;

export function link(path, text) {
  return el("a", { href: path }, String(text));
}

/** Point the bar's link to the same study or trial in optuna-dashboard. */
export function linkDashboard(id, trial) {
  if (id === null || id === undefined) return;
  const trials = trial === undefined ? "" : `/trials?numbers=${trial}`;
  document.getElementById("dashboard").href = `/dashboard/studies/${id}${trials}`;
}
