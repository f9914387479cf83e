// Time series on a canvas, with a legend in text. A plot is a <figure>.

const HEIGHT = 130;
const COLOURS = 6;
const SHORTEST_S = 300;

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");

export class Plot {
  /** `format` makes the text of a value. `bars`: the values are of hours or days in UTC, not of moments. */
  constructor(figure, title, format, { bars = false } = {}) {
    this.figure = figure;
    this.title = title;
    this.format = format;
    this.bars = bars;
    this.names = [];
    this.caption = document.createElement("figcaption");
    this.canvas = document.createElement("div");
    this.canvas.setAttribute("role", "img");
    figure.append(this.caption, this.canvas);
    new ResizeObserver(() => this.resize()).observe(figure);
    dark.addEventListener("change", () => this.rebuild());
  }

  /** `times` are seconds; `series` maps a name to its values, null where there is none. */
  show(times, series) {
    this.data = [times, ...Object.values(series)];
    const names = Object.keys(series);
    if (names.join("\n") !== this.names.join("\n")) {
      this.names = names;
      this.rebuild();
    } else {
      this.plot.setData(this.data);
    }
    this.describe(this.plot.cursor.idx);
  }

  rebuild() {
    if (this.data === undefined) return;
    this.plot?.destroy();
    this.addLegend();
    this.plot = new uPlot(this.options(), this.data, this.canvas);
    this.describe(null);
  }

  addLegend() {
    const title = document.createElement("strong");
    title.textContent = this.title;
    this.values = this.names.map(() => document.createElement("span"));
    const entries = this.names.map((name, index) => {
      const entry = document.createElement("span");
      const swatch = document.createElement("span");
      swatch.className = `swatch swatch-${(index % COLOURS) + 1}`;
      entry.append(swatch, `${name} `, this.values[index]);
      return entry;
    });
    this.caption.replaceChildren(title, ...entries);
  }

  options() {
    const axis = { stroke: css("--muted"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false } };
    const series = this.names.map((name, index) => {
      const stroke = css(`--series-${(index % COLOURS) + 1}`);
      const filled = this.bars ? { fill: stroke, paths: uPlot.paths.bars({ size: [0.8, 40] }) } : {};
      return { label: name, stroke, width: 1.5, points: { show: false }, ...filled };
    });
    return {
      width: this.width(),
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      tzDate: this.bars ? (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC") : undefined,
      scales: { x: { time: true, range: () => this.span() }, y: { range: (_, __, high) => [0, high > 0 ? 1.1 * high : 1] } },
      axes: [
        { ...axis, size: this.bars ? 36 : 24, values: (_, ticks) => ticks.map(this.bars ? utc : clock).map(unlessRepeated) },
        { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => this.format(tick)) },
      ],
      series: [{}, ...series],
      hooks: { setCursor: [(plot) => this.describe(plot.cursor.idx)] },
    };
  }

  /** Show the values at the index of the cursor, or the last ones. */
  describe(index) {
    const at = index ?? this.data[0].length - 1;
    const texts = this.values.map((_, series) => {
      const value = this.data[series + 1][at];
      return value === null || value === undefined ? "–" : this.format(value);
    });
    this.values.forEach((value, series) => (value.textContent = texts[series]));
    this.canvas.setAttribute("aria-label", `${this.title}: ${this.names.map((name, i) => `${name} ${texts[i]}`).join(", ")}`);
  }

  /** The first and last time shown: with the halves of the outer bars, or at least some minutes. */
  span() {
    const times = this.data[0];
    const [first, last] = [times[0], times[times.length - 1]];
    if (!this.bars) return [Math.min(first, last - SHORTEST_S), last];
    const half = (times[1] - first) / 2;
    return [first - half, last + half];
  }

  width() {
    return Math.max(120, this.figure.clientWidth - 16);
  }

  resize() {
    if (this.plot !== undefined && this.plot.width !== this.width()) this.plot.setSize({ width: this.width(), height: HEIGHT });
  }
}

const unlessRepeated = (label, index, labels) => (label === labels[index - 1] ? "" : label);

/** The day at midnight, else the time. */
function utc(seconds) {
  const text = new Date(seconds * 1000).toISOString();
  return seconds % 86_400 === 0 ? text.slice(5, 10) : text.slice(11, 16);
}

export const clock = (seconds) =>
  new Date(seconds * 1000).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
