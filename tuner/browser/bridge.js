// In optuna-dashboard's pages: a link to ours, of the same study or trial.
const bridge = document.createElement("a");
bridge.id = "tuner-bridge";
bridge.style.cssText = "position:fixed;z-index:2000;right:16px;bottom:16px;padding:10px 18px;border-radius:24px;" +
  "background:#1976d2;color:#fff;font:500 14px Roboto,Helvetica,Arial,sans-serif;text-decoration:none;" +
  "box-shadow:0 3px 5px rgba(0,0,0,.3)";

function point() {
  const study = /^\/dashboard\/studies\/(\d+)/.exec(location.pathname);
  const trial = new URLSearchParams(location.search).get("numbers");
  bridge.href = study ? `/tuner/dashboard/${study[1]}${/^\d+$/.test(trial ?? "") ? `/${trial}` : ""}` : "/tuner/";
  bridge.textContent = study ? (/^\d+$/.test(trial ?? "") ? `Curves of trial ${trial}` : "Arms and curves") : "Workers and queue";
}

point();
setInterval(point, 500); // the dashboard changes its address without loading a page
addEventListener("DOMContentLoaded", () => document.body.append(bridge));
