// The service: which workers are there, what they hold, how far the studies are.
import { ago, chip, duration, el, fill, link, number, poll, studyPath, table, trialPath } from "./live.js";

const main = document.getElementById("main");

function workers(found, now) {
  // One line for each trial that a worker has in hand.
  const rows = found.flatMap((w) => (w.holdings.length ? w.holdings : [null]).map((held) => [
    w.host, w.device, chip(w.state),
    held ? link(studyPath(held.study), held.study) : null,
    held ? link(trialPath(held.study, held.trial), held.trial) : null,
    held && held.step !== null ? String(held.step) : null,
    held ? ago(held.measured_at ?? held.claimed_at, now) : null,
    w.state === "ended" ? null : duration(w.lease_age_s),
    held ? String(held.attempt) : null, String(w.worker), String(w.pid),
  ]));
  const columns = [
    ["Host"], ["Device"], ["State"], ["Study"], ["Trial", "number"], ["Step", "number"], ["Last progress"],
    ["Lease age"], ["Attempt", "number"], ["Worker", "number"], ["Process", "number"],
  ];
  const alive = found.filter((w) => w.state === "alive");
  const devices = new Set(alive.map((w) => `${w.host} ${w.device}`));
  const busy = alive.filter((w) => w.holdings.length).length;
  return el("section", { class: "card wide", id: "workers" },
    el("h2", {}, "Workers"),
    el("p", { class: "soft" }, `${alive.length} alive on ${devices.size} ${devices.size === 1 ? "device" : "devices"}, ${busy} of them at a trial`),
    found.length ? table(columns, rows) : el("p", {}, "None. Start one: tuner worker"));
}

function meter(study) {
  const share = Math.min(1, study.n_ended / study.n_trials);
  const fill = el("i");
  fill.style.width = `${100 * share}%`;
  return el("div", { class: "meter", role: "img", "aria-label": `${study.n_ended} of ${study.n_trials} ended` }, fill);
}

function studies(all, ids, now) {
  // Those at work and in the queue first, in turn, then the newest.
  const found = [...all].sort((a, b) => (a.place ?? 1e9) - (b.place ?? 1e9) || b.started_at - a.started_at);
  const rows = found.map((s) => [
    link(studyPath(s.study), s.study), chip(s.state), meter(s), `${s.n_ended} / ${s.n_trials}`, duration(s.remaining_s),
    number(s.trials_per_hour, 3), ago(s.last_measured_at, now), number(s.place), String(s.running), String(s.waiting),
    String(s.complete), String(s.pruned), String(s.failed),
    ids[s.study] === undefined ? null : link(`/dashboard/studies/${ids[s.study]}`, "plots"),
  ]);
  const columns = [
    ["Study"], ["State"], [""], ["Ended", "number"], ["Left"], ["Trials per hour", "number"], ["Last progress"],
    ["Queue", "number"], ["Running", "number"], ["Waiting", "number"], ["Complete", "number"], ["Pruned", "number"],
    ["Failed", "number"], ["Optuna"],
  ];
  return el("section", { class: "card wide", id: "studies" },
    el("h2", {}, "Studies"),
    found.length ? table(columns, rows) : el("p", {}, "None. Put one in the queue: tuner submit --study NAME"));
}

poll(() => "/tuner/api/service", 2, (service) => {
  fill(main,
    el("h1", { class: "wide" }, "Service"),
    workers(service.workers, service.now),
    studies(service.studies, service.dashboard_ids, service.now));
});
