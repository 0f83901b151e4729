"use strict";
// Draws the panels of a report from the JSON in the page; a legend's buttons hide and show their marks.
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"]};
  // A finger scrolls the page; plots are moved by a mouse alone.
  if (matchMedia("(pointer: coarse)").matches || innerWidth < 700) {
    Object.assign(config, {displayModeBar: false, scrollZoom: false});
    for (const plot of plots) plot.layout.dragmode = false;
  }
  const draw = (place) => {
    const {data, layout} = plots[place.dataset.plot];
    Plotly.newPlot(place, data, layout, config);
  };
  const places = document.querySelectorAll(".plot");
  const soon = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      soon.unobserve(entry.target);
      draw(entry.target);
    }
  }, {rootMargin: "1500px"});
  for (const place of places) soon.observe(place);
  addEventListener("beforeprint", () => {
    for (const place of places) if (!place.classList.contains("js-plotly-plot")) { soon.unobserve(place); draw(place); }
  });

  document.addEventListener("click", (event) => {
    const button = event.target.closest(".legend button");
    if (!button) return;
    const figure = button.closest("figure");
    const traces = (place) => plots[place.dataset.plot].data.map((trace, i) => [trace, i]);
    const known = [...figure.querySelectorAll(".plot")].some((place) =>
      traces(place).some(([trace]) => trace.meta === button.dataset.name));
    if (!known) return;
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const place of figure.querySelectorAll(".plot")) {
      const chosen = traces(place).filter(([trace]) => trace.meta === button.dataset.name);
      for (const [trace] of chosen) trace.visible = shown;
      if (chosen.length && place.data) Plotly.restyle(place, {visible: shown}, chosen.map(([, i]) => i));
    }
  });
})();
