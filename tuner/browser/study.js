// A study: its arms side by side, how the best rose, its trials as they come.
import { chip, duration, el, facts, fill, link, linkDashboard, number, poll, table, trialPath } from "./live.js";
import { COLOURS, GREY, draw, line, plotCard } from "./plots.js";

const MAX_ROWS = 100;
const name = document.body.dataset.study;
const main = document.getElementById("main");
const trials = new Map();
let version = "";
let shown = null;

const head = el("section", { class: "card wide", id: "study" });
const arms = el("section", { class: "card wide", id: "arms" });
const history = plotCard("history", "Best so far", "Feasible complete trials of each arm; infeasible ones are grey.");
const curves = plotCard("curves", "Learning curves of the arms", "The best trial of each arm, and its default config dashed.");
const list = el("section", { class: "card wide", id: "trials" });
const arm = el("select", { id: "arm" });
const state = el("select", { id: "state" });
const order = el("select", { id: "order" },
  el("option", { value: "newest" }, "newest first"), el("option", { value: "best" }, "best first"));
const rows = el("div");
list.append(
  el("h2", {}, "Trials"),
  el("div", { class: "choice" }, el("label", { for: "arm" }, "Arm"), arm, el("label", { for: "state" }, "State"), state,
    el("label", { for: "order" }, "Order"), order),
  rows);
main.append(head, arms, history, curves, list);
for (const choice of [arm, state, order]) choice.addEventListener("change", () => drawTrials(shown));

function choices(select, names) {
  if (select.options.length === names.length + 1) return;
  const kept = select.value;
  select.replaceChildren(el("option", { value: "" }, "all"), ...names.map((n) => el("option", { value: n }, n)));
  select.value = names.includes(kept) ? kept : "";
}

function drawHead(study) {
  const p = study.progress;
  const d = study.decision;
  fill(head,
    el("h1", {}, study.study, " ", chip(p.state), " ", study.simulated ? chip("simulated") : null),
    study.description ? el("p", {}, study.description) : null,
    facts([
      ["Ended", `${p.n_ended} of ${p.n_trials}`], ["Running", String(p.running)], ["Complete", String(p.complete)],
      ["Pruned", String(p.pruned)], ["Failed", String(p.failed)], ["Waiting", String(p.waiting)],
      ["Trials per hour", number(p.trials_per_hour, 3)], ["Left", duration(p.remaining_s)],
      ["Objective", `${study.objective.direction} ${study.objective.metric}`],
      ["Constraint", `${d.task}: precision at least ${d.target_precision} at confidence ${d.confidence}, unit ${d.unit}`],
      ["Data", study.data + (study.simulated ? " (simulated, not real)" : "")],
      ["Thresholds", study.threshold_status],
      ["Workers", study.workers.map((w) => {
        const held = w.holdings.filter((h) => h.study === study.study).map((h) => h.trial);
        return `${w.host} ${w.device}: ${held.length === 1 ? "trial" : "trials"} ${held.join(" ")}`;
      }).join(", ")],
    ]));
}

function drawArms(study) {
  const value = (number_) => (number_ === null ? null : trials.get(number_));
  const cell = (trial) => (trial
    ? el("span", {}, number(trial.value), " ", link(trialPath(name, trial.number), `trial ${trial.number}`))
    : null);
  const found = study.arms.map((a) => {
    const best = value(a.best);
    const plain = value(a.default);
    return [
      a.arm, cell(plain),
      best ? el("span", {}, cell(best), " ", a.feasible ? null : chip("infeasible")) : null,
      best && plain ? number(best.value - plain.value, 3) : null,
      a.mean === null ? null : number(a.mean) + (a.sd === null ? "" : ` ± ${number(a.sd, 2)}`),
      `${a.n_feasible} of ${a.counts.complete}`, String(a.counts.complete), String(a.counts.pruned),
      String(a.counts.failed), String(a.counts.running),
    ];
  });
  const columns = [
    ["Arm"], ["Default"], ["Best"], ["Gain", "number"], ["Mean ± sd of complete"], ["Feasible", "number"],
    ["Complete", "number"], ["Pruned", "number"], ["Failed", "number"], ["Running", "number"],
  ];
  fill(arms,
    el("h2", {}, "Arms"), el("p", { class: "soft" }, `${study.objective.metric}, best step of each trial`),
    table(columns, found));
  draw(curves, study.arms.flatMap((a, i) => {
    const colour = COLOURS[i % COLOURS.length];
    const drawn = [];
    if (a.curves.best) drawn.push(line(`${a.arm}: trial ${a.best}`, ...a.curves.best, colour));
    if (a.curves.default && a.default !== a.best) {
      const dashed = { line: { color: colour, dash: "dot", width: 1.5 }, showlegend: false };
      drawn.push(line(`${a.arm}: default`, ...a.curves.default, colour, dashed));
    }
    return drawn;
  }), { x: "step", y: study.objective.metric });
}

function drawHistory(study) {
  const up = study.objective.direction === "maximize";
  const complete = [...trials.values()].filter((t) => t.state === "complete" && t.value !== null);
  complete.sort((a, b) => a.number - b.number);
  const traces = [];
  study.arms.forEach((a, i) => {
    const colour = COLOURS[i % COLOURS.length];
    const mine = complete.filter((t) => t.arm === a.arm && t.feasible);
    if (!mine.length) return;
    let best = null;
    const steps = mine.map((t) => (best = best === null ? t.value : up ? Math.max(best, t.value) : Math.min(best, t.value)));
    traces.push(line(a.arm, mine.map((t) => t.number), steps, colour, { line: { color: colour, shape: "hv" }, mode: "lines" }));
    traces.push({ type: "scatter", mode: "markers", name: a.arm, showlegend: false, x: mine.map((t) => t.number),
      y: mine.map((t) => t.value), marker: { color: colour, size: 5 } });
  });
  const grey = complete.filter((t) => !t.feasible);
  if (grey.length) {
    traces.push({ type: "scatter", mode: "markers", name: "infeasible", x: grey.map((t) => t.number),
      y: grey.map((t) => t.value), marker: { color: GREY, size: 5 } });
  }
  draw(history, traces, { x: "trial", y: study.objective.metric });
}

function drawTrials(study) {
  if (!study) return;
  const up = study.objective.direction === "maximize" ? -1 : 1;
  const all = [...trials.values()].filter((t) => (!arm.value || t.arm === arm.value) && (!state.value || t.state === state.value));
  const rank = (t) => (t.value === null ? Infinity : up * t.value) + (t.feasible === false ? 1e6 : 0);
  all.sort(order.value === "best" ? (a, b) => rank(a) - rank(b) : (a, b) => b.number - a.number);
  const columns = [
    ["Trial", "number"], ["Arm"], ["State"], ["Value", "number"], ["Feasible"], ["Violation", "number"],
    ["Recall", "number"], ["Precision", "number"], ["Bound", "number"], ["Threshold", "number"], ["Best step", "number"],
    ["Last step", "number"], ["Attempts", "number"], ["Training"], ["Failure", "wrap"],
  ];
  const found = all.slice(0, MAX_ROWS).map((t) => [
    link(trialPath(name, t.number), t.number), t.arm, chip(t.state), number(t.value),
    t.feasible === null ? null : el("span", { class: t.feasible ? "good" : "bad" }, t.feasible ? "yes" : "no"),
    number(t.violation, 3), number(t.recall, 3), number(t.precision, 3), number(t.precision_bound, 3),
    number(t.threshold, 3), number(t.step), number(t.last_step), number(t.attempts), duration(t.elapsed_s), t.failure,
  ]);
  fill(rows,
    table(columns, found),
    el("p", { class: "soft" }, `${Math.min(MAX_ROWS, all.length)} of ${all.length} trials`));
}

poll(() => `/tuner/api/studies/${encodeURIComponent(name)}?since=${version}`, 2, (study) => {
  if (study.all) trials.clear();
  for (const values of study.trials) {
    const trial = Object.fromEntries(study.columns.map((column, i) => [column, values[i]]));
    trials.set(trial.number, trial);
  }
  const changed = study.trials.length > 0 || !shown;
  version = study.version;
  shown = study;
  linkDashboard(study.dashboard_id);
  choices(arm, study.arms.map((a) => a.arm));
  choices(state, ["complete", "pruned", "failed", "running", "waiting"]);
  drawHead(study);
  if (!changed) return;
  drawArms(study);
  drawHistory(study);
  drawTrials(study);
});
