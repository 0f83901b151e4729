// A trial's run: how it learned, where its threshold lies, whether its probabilities hold, how its tasks pull.
import { ago, chip, duration, el, facts, fill, linkDashboard, number, poll, table } from "./live.js";
import { COLOURS, GREY, draw, line, plotCard } from "./plots.js";

const { study: name, number: trialNumber } = document.body.dataset;
const main = document.getElementById("main");
const head = el("section", { class: "card wide", id: "trial" });
const learning = plotCard("learning", "Objective");
const losses = plotCard("losses", "Losses", "Training solid, validation dashed; each from its first value = 1.");
const pr = plotCard("pr", "Precision–recall", " ");
const calibration = plotCard("calibration", "Calibration", "Mean predicted probability against the observed share; the size of a point is its number of rows.");
const cosines = plotCard("cosines", "Task-gradient cosines", "Below zero two tasks pull the shared layers apart.");
const shares = plotCard("shares", "Loss shares", "Of the weighted training loss.");
const gradients = plotCard("gradients", "Gradient shares", "Of the weighted gradient norms in the last shared layer.");
const config = el("section", { class: "card wide", id: "config" });
const attempts = el("section", { class: "card", id: "attempts" });
main.append(head, learning, pr, calibration, losses, cosines, shares, gradients, attempts, config);

/** The metrics whose names fit, as [what the pattern's groups caught, values]. */
function matching(series, pattern) {
  return Object.entries(series).flatMap(([metric, values]) => {
    const match = pattern.exec(metric);
    return match ? [[match.slice(1), values]] : [];
  });
}

function drawHead(trial) {
  fill(head,
    el("h1", {}, `Trial ${trial.number} `, chip(trial.state), " ", trial.feasible === false ? chip("infeasible") : null, " ",
      trial.simulated ? chip("simulated") : null),
    trial.failure ? el("p", { class: "bad" }, trial.failure) : null,
    facts([
      ["Arm", trial.arm], [trial.objective.metric, number(trial.value)], ["Best step", number(trial.step)],
      ["Last step", number(trial.last_step)], ["Violation", number(trial.violation, 3)],
      ["Threshold (logit)", number(trial.threshold)], ["Precision", number(trial.precision)],
      [`Bound at ${trial.decision.confidence}`, number(trial.precision_bound)], ["Recall", number(trial.recall)],
      ["Threshold is a", trial.threshold === null ? null : trial.threshold_status],
      ["Training", duration(trial.elapsed.at(-1))], ["Data", trial.data + (trial.simulated ? " (simulated, not real)" : "")],
      ["Checkpoint", trial.checkpoint && `attempt ${trial.checkpoint.attempt}, step ${trial.checkpoint.step}`],
      ["Uploaded", trial.uploaded && `attempt ${trial.uploaded.attempt}, step ${trial.uploaded.step}`],
    ]));
}

function drawLearning(trial) {
  const metric = trial.objective.metric;
  const values = trial.series[metric];
  const traces = [];
  if (values) {
    const errors = trial.series[`${metric}_se`];
    const more = errors ? { error_y: { type: "data", array: errors, thickness: 1, width: 2 } } : {};
    traces.push(line(metric, trial.steps, values, COLOURS[0], { mode: "lines+markers", ...more }));
    traces.push({ type: "scatter", mode: "markers", name: "best step", x: [trial.step], y: [trial.value],
      marker: { color: trial.feasible ? COLOURS[2] : GREY, size: 12, symbol: "star" } });
  }
  draw(learning, traces, { x: "step", y: metric });
}

function drawLosses(trial) {
  const tasks = [];
  const traces = matching(trial.series, /^(train|valid)\/([^/]+)\/loss$/).map(([[role, task], values]) => {
    if (!tasks.includes(task)) tasks.push(task);
    const colour = COLOURS[tasks.indexOf(task) % COLOURS.length];
    const first = values.find((value) => value !== null && value !== 0) ?? 1;
    const dash = role === "valid" ? "dash" : "solid";
    const showlegend = role === "train" || !(`train/${task}/loss` in trial.series);
    return line(showlegend ? task : `${task} ${role}`, trial.steps, values.map((v) => (v === null ? null : v / first)), colour,
      { line: { color: colour, dash, width: 2 }, showlegend, customdata: values, hovertemplate: "%{customdata:.4g}" });
  });
  draw(losses, traces, { x: "step", y: "loss, from 1" });
}

function drawPrecisionRecall(trial) {
  const found = trial.curves && trial.curves.pr;
  if (!found) return draw(pr, []);
  const d = trial.decision;
  const cut = `valid/${d.task}/`;
  const at = trial.steps.indexOf(trial.curves.step);
  const value = (metric) => (at < 0 || !trial.series[cut + metric] ? null : trial.series[cut + metric][at]);
  const hover = "recall %{x:.4f}<br>%{y:.4f}<br>threshold %{customdata:.4f}";
  const points = { customdata: found.threshold, hovertemplate: hover };
  const traces = [
    line("precision", found.recall, found.precision, COLOURS[0], points),
    line(`lower bound at confidence ${d.confidence}`, found.recall, found.bound, COLOURS[1],
      { ...points, line: { color: COLOURS[1], dash: "dash", width: 1.5 } }),
    line("target", [0, 1], [d.target_precision, d.target_precision], GREY, { line: { color: GREY, dash: "dot", width: 1.5 }, hoverinfo: "skip" }),
  ];
  const [recall, precision, bound, threshold] = ["recall", "precision", "precision_bound", "threshold"].map(value);
  if (recall !== null && precision !== null) {
    const colour = trial.feasible ? COLOURS[2] : "#d32f2f";
    traces.push({ type: "scatter", mode: "lines+markers", name: `threshold ${number(threshold)}${trial.feasible ? "" : ", infeasible"}`,
      x: [recall, recall], y: [bound, precision], line: { color: colour, width: 3 }, marker: { color: colour, size: 9 } });
  }
  pr.querySelector("p").textContent = `${d.task} on validation rows, step ${trial.curves.step}; ${trial.threshold_status}.`;
  draw(pr, traces, { x: "recall", y: "precision", xaxis: { range: [-0.02, 1.02] }, yaxis: { rangemode: "tozero" } });
}

function drawCalibration(trial) {
  const found = trial.curves && trial.curves.calibration;
  if (!found) return draw(calibration, []);
  const most = Math.max(...found.count, 1);
  const end = Math.max(...found.predicted, ...found.observed, 1e-6);
  draw(calibration, [
    line("perfect", [0, end], [0, end], GREY, { line: { color: GREY, dash: "dot" }, hoverinfo: "skip" }),
    line("observed", found.predicted, found.observed, COLOURS[0], {
      mode: "lines+markers", customdata: found.count, hovertemplate: "predicted %{x:.4f}<br>observed %{y:.4f}<br>%{customdata} rows",
      marker: { color: COLOURS[0], size: found.count.map((n) => 5 + 11 * Math.sqrt(n / most)) } }),
  ], { x: "predicted", y: "observed" });
}

function drawTasks(trial) {
  const lines_ = (found) => found.map(([names, values], i) =>
    line(names.join(" · "), trial.steps, values, COLOURS[i % COLOURS.length]));
  const areas = (found) => found.map(([[task], values], i) =>
    line(task, trial.steps, values, COLOURS[i % COLOURS.length], { stackgroup: "all", mode: "lines" }));
  const whole = { x: "step", y: "share", yaxis: { range: [0, 1] } };
  draw(cosines, lines_(matching(trial.series, /^train\/cosine\/([^/]+)\/([^/]+)$/)), { x: "step", y: "cosine", yaxis: { range: [-1.05, 1.05] } });
  draw(shares, areas(matching(trial.series, /^train\/([^/]+)\/loss_share$/)), whole);
  draw(gradients, areas(matching(trial.series, /^train\/([^/]+)\/gradient_share$/)), whole);
}

function drawConfig(trial) {
  const searched = new Set(trial.searched);
  const shown = (value) => (typeof value === "object" ? JSON.stringify(value) : number(value));
  fill(config, el("h2", {}, "Config"), el("p", { class: "soft" }, "Searched values are bold."),
    facts(trial.config.map(([path, value]) => [path, searched.has(path) ? el("b", {}, shown(value)) : shown(value)])));
  const tries = trial.tries.map((t) => [String(t.attempt), t.host, t.device, t.outcome ?? chip("running"), ago(t.claimed_at, trial.now)]);
  fill(attempts, el("h2", {}, "Attempts"),
    table([["Attempt", "number"], ["Host"], ["Device"], ["Outcome"], ["Begun"]], tries));
}

poll(() => `/tuner/api/studies/${encodeURIComponent(name)}/trials/${trialNumber}`, 2, (trial) => {
  linkDashboard(trial.dashboard_id, trial.number);
  for (const part of [drawHead, drawLearning, drawLosses, drawPrecisionRecall, drawCalibration, drawTasks, drawConfig]) part(trial);
});
