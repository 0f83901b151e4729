// Plotly in the colours of the page; every plot is drawn once and then updated in place.
import { el } from "./live.js";

const dark = matchMedia("(prefers-color-scheme: dark)");
export const COLOURS = ["#2196f3", "#e8710a", "#00a37a", "#c2185b", "#7e57c2", "#8d6e63", "#607d8b", "#afb42b"];
export const GREY = "#9e9e9e";

function axis(title) {
  const line = dark.matches ? "rgba(255,255,255,.16)" : "rgba(0,0,0,.1)";
  return { title: { text: title }, gridcolor: line, zerolinecolor: line, automargin: true };
}

/** Steps are whole numbers: where few of them are drawn there is nothing between two. */
function ticks(title, traces) {
  const few = title === "step" && Math.max(...traces.flatMap((trace) => trace.x)) < 10;
  return few ? { tick0: 0, dtick: 1 } : {};
}

/** A card with one plot in it, to be drawn by `draw(card, traces, {x, y, shapes})`. */
export function plotCard(id, title, note, wide) {
  return el("section", { class: wide ? "card wide" : "card", id, hidden: true },
    el("h2", {}, title), note ? el("p", { class: "soft" }, note) : null, el("div", { class: "plot" }));
}

export function draw(card, traces, { x = "", y = "", xaxis = {}, yaxis = {}, shapes = [], hovermode = "closest" } = {}) {
  card.hidden = traces.length === 0;
  if (card.hidden) return;
  const plot = card.querySelector(".plot");
  const named = traces.filter((trace) => trace.showlegend !== false).length;
  const legendRows = named > 1 ? Math.ceil(named / Math.max(1, Math.floor(plot.clientWidth / 200))) : 0;
  plot.style.height = `${300 + 20 * legendRows}px`;
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode, shapes,
    font: { family: "Roboto, Helvetica, Arial, sans-serif", color: dark.matches ? "#fff" : "rgba(0,0,0,.87)" },
    margin: { l: 56, r: 12, t: 8, b: 44 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    xaxis: { ...axis(x), ...ticks(x, traces), ...xaxis }, yaxis: { ...axis(y), ...yaxis },
    showlegend: named > 1, uirevision: "kept",
  };
  Plotly.react(plot, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
}

export function line(name, x, y, colour, more = {}) {
  const mode = x.length > 1 ? "lines" : "markers";
  return { type: "scatter", mode, name, x, y, line: { color: colour, width: 2 }, marker: { color: colour }, ...more };
}
