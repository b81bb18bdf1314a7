"use strict";
// Turns the data beside every <figure data-chart> into a Chart.js chart, in the page's own colours.
const figures = [...document.querySelectorAll("figure[data-chart]")].map((figure) => ({
  figure,
  data: JSON.parse(figure.querySelector("script").textContent),
}));
const axis = document.getElementById("axis");
let charts = [];

function color(name, alpha = 1) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const full = hex.length === 4 ? hex.replace(/[0-9a-f]/g, "$&$&") : hex;
  return full + Math.round(alpha * 255).toString(16).padStart(2, "0");
}

function number(value) {
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3) return value.toExponential(1);
  return new Intl.NumberFormat("en", { notation: Math.abs(value) >= 1e4 ? "compact" : "standard",
    maximumSignificantDigits: 4 }).format(value);
}

// Of the many ticks of a logarithmic axis those that have room.
function oneTwoFive(value) {
  return "125".includes(value.toExponential()[0]) ? number(value) : "";
}

function lines(data, severalRuns) {
  const label = { training: "training", test: "test", noise: "every update" };
  const name = (series) => (series.kind in label ? `${series.run}, ${label[series.kind]}` : series.run);
  return {
    type: "line",
    data: {
      datasets: data.series.map((series) => {
        const isTest = series.kind === "test";
        const isPoints = series.kind === "points";
        const index = (severalRuns ? series.color : isTest ? 1 : 0) % 8;
        const paint = color(`color-${index}`, series.kind === "noise" ? 0.25 : 1);
        return {
          label: severalRuns ? name(series) : label[series.kind],
          data: series.y.map((y, place) => ({ x: series[axis.value][place], y })),
          borderColor: paint,
          backgroundColor: paint,
          borderWidth: series.kind === "noise" ? 1 : 2,
          borderDash: severalRuns && isTest ? [5, 4] : [],
          pointRadius: isTest || isPoints ? 3 : series.y.length === 1 ? 3 : 0,
          pointHitRadius: 8,
          order: series.kind === "noise" ? 2 : isTest ? 0 : 1,
        };
      }),
    },
    options: {
      parsing: false,
      scales: {
        x: { type: data.scale ?? "linear", ticks: { callback: data.scale ? oneTwoFive : number, maxRotation: 0 }, grid: { display: false } },
        y: { ticks: { callback: number } },
      },
      interaction: { mode: "nearest", axis: "x", intersect: false },
      plugins: {
        legend: { display: new Set(data.series.map((series) => series.run + series.kind)).size > 1,
          labels: { boxHeight: 2, boxWidth: 18,
            filter: (item) => data.series[item.datasetIndex].kind !== "noise" } },
        tooltip: { callbacks: {
          title: (items) => `${axis.selectedOptions[0].text}: ${number(items[0].parsed.x)}`,
          label: (item) => `${item.dataset.label}: ${number(item.parsed.y)}`,
        } },
      },
    },
  };
}

// Whiskers from the low to the high end of a bar's interval, where there is one.
const intervals = {
  id: "intervals",
  afterDatasetsDraw(chart) {
    const pen = chart.ctx;
    pen.save();
    pen.strokeStyle = color("ink");
    pen.lineWidth = 1.5;
    chart.data.datasets.forEach((dataset, index) => {
      chart.getDatasetMeta(index).data.forEach((bar, place) => {
        const ends = [dataset.low[place], dataset.high[place]];
        if (!chart.isDatasetVisible(index) || ends.includes(null)) return;
        const [low, high] = ends.map((end) => chart.scales.x.getPixelForValue(end));
        pen.beginPath();
        pen.moveTo(low, bar.y); pen.lineTo(high, bar.y);
        for (const x of [low, high]) { pen.moveTo(x, bar.y - 3); pen.lineTo(x, bar.y + 3); }
        pen.stroke();
      });
    });
    pen.restore();
  },
};

function bars(data, severalRuns) {
  return {
    type: "bar",
    plugins: [intervals],
    data: {
      labels: data.groups,
      datasets: data.series.map((series) => ({
        label: series.run,
        data: series.value,
        low: series.low,
        high: series.high,
        backgroundColor: color(`color-${series.color % 8}`, 0.75),
        maxBarThickness: 18,
      })),
    },
    options: {
      indexAxis: "y",
      scales: {
        x: { beginAtZero: true, title: { display: true, text: data.unit },
          suggestedMax: Math.max(...data.series.flatMap((series) => series.high.filter(Number.isFinite)), 0),
          ticks: { callback: number } },
        y: { grid: { display: false }, ticks: { autoSkip: false, callback(value) {
          const most = this.chart.width < 600 ? 18 : 50;
          const label = this.getLabelForValue(value);
          return label.length > most ? `${label.slice(0, most - 1)}…` : label;
        } } },
      },
      plugins: { legend: { display: severalRuns } },
    },
  };
}

function draw() {
  charts.forEach((chart) => chart.destroy());
  Chart.defaults.color = color("soft");
  Chart.defaults.borderColor = color("line");
  Chart.defaults.font.family = "system-ui, sans-serif";
  Chart.defaults.maintainAspectRatio = false;
  Chart.defaults.animation = false;
  const severalRuns = document.querySelectorAll("header .run").length > 1;
  charts = figures.map(({ figure, data }) => {
    if (data.kind === "bars") {
      figure.style.height = `${70 + data.groups.length * Math.max(24, 18 * data.series.length)}px`;
    }
    const make = data.kind === "bars" ? bars : lines;
    return new Chart(figure.querySelector("canvas"), make(data, data.several ?? severalRuns));
  });
}

draw();
axis?.addEventListener("change", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
