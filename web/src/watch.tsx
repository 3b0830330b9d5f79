/** What has become of it all: reward, versions, latency, and every event with its story. */

import { useEffect, useMemo, useState } from "preact/hooks";
import type uPlot from "uplot";
import * as api from "./api";
import { fill, type Language, language, words } from "./i18n";
import { color, Plot } from "./plot";
import { reasonOf } from "./reasons";
import { useSignal } from "./state";
import { moved, told } from "./story";
import { median, minus, runningMean, scaled } from "./text";
import { before, ended, eValue, pairsOf, progress, trialOf } from "./trial";

const EVERY = 2000;
const MEAN_OF = 20;
const LATENCY_OF = 50;
const SHOWN = 200;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];
// the ends of the scale and its middle, whatever was said
const REWARDS = {
  splits: [-1, -0.5, 0, 0.5, 1],
  values: (_: uPlot, splits: number[]) => splits.map((value) => minus(String(value))),
};
const STAGES = ["queued", "begun", "stepped", "gated", "served"] as const;

interface Seen {
  stories: api.Story[];
  versions: api.Versions | null;
  sources: api.Source[];
  fault: string;
}

/** Everything anew every two seconds; of the events those whose story may still change, and later ones. */
function useServer(): [Seen, () => void] {
  const [seen, setSeen] = useState<Seen>({ stories: [], versions: null, sources: [], fault: "" });
  const [asked, ask] = useState(0);
  useEffect(() => {
    let gone = false;
    let timer = 0;
    let stories: api.Story[] = [];
    const look = async (): Promise<void> => {
      try {
        const open = stories.find((one) => one.state === "pending" || (one.state === "used" && one.seconds === null));
        const after = open ? open.offset - 1 : (stories.at(-1)?.offset ?? 0);
        const [versions, sources, news] = await Promise.all([api.versions(), api.sources(), api.stories(after)]);
        stories = [...stories.filter((one) => one.offset <= after), ...news];
        if (!gone) setSeen({ stories, versions, sources, fault: "" });
      } catch (error) {
        if (!gone) setSeen((now) => ({ ...now, fault: String((error as Error).message) }));
      }
      if (!gone) timer = window.setTimeout(look, EVERY);
    };
    void look();
    return () => {
      gone = true;
      window.clearTimeout(timer);
    };
  }, [asked]);
  return [seen, () => ask((n) => n + 1)];
}

export function Watch() {
  const [seen, refresh] = useServer();
  const [scale, setScale] = useState<api.Scores>({ low: 0, high: 1 });
  useEffect(
    () =>
      void api.model().then(
        (one) => setScale(one.scores),
        () => undefined,
      ),
    [],
  );
  const tongue = useSignal(language);
  return (
    <main class="watch">
      {seen.fault && (
        <p class="fault" role="alert">
          {seen.fault}
        </p>
      )}
      <Reward stories={seen.stories} tongue={tongue} scale={scale} />
      <Latency stories={seen.stories} tried={!!seen.versions?.trial} />
      <Versions versions={seen.versions} refresh={refresh} />
      {seen.sources.length > 1 && <Sources sources={seen.sources} />}
      <Log stories={seen.stories} />
    </main>
  );
}

/** Thumbs as they are, and scores on their scale, as the means of the sources are told. */
function Reward({ stories, tongue, scale }: { stories: api.Story[]; tongue: Language; scale: api.Scores }) {
  const say = words();
  const rated = stories.filter(
    (one) => (one.kind === "thumb" || one.kind === "score") && typeof one.value === "number",
  );
  const values = rated.map((one) =>
    one.kind === "thumb" ? (one.value as number) : scaled(one.value as number, scale.low, scale.high),
  );
  const data: uPlot.AlignedData = useMemo(
    () => [rated.map((_, i) => i + 1), values, runningMean(values, MEAN_OF)],
    // what was rated never changes, it only grows
    [values.length, scale],
  );
  // the words are those of the language
  const options = useMemo(
    () => ({
      scales: {
        x: { time: false, range: (_: uPlot, low: number, high: number): [number, number] => [low - 0.5, high + 0.5] },
        y: { range: [-1.1, 1.1] as [number, number] },
      },
      legend: { show: false },
      cursor: { show: false },
      axes: [
        { stroke: color("--soft"), grid: { show: false }, ticks: { show: false }, incrs: WHOLE, size: 30 },
        { stroke: color("--soft"), grid: { stroke: color("--line") }, ticks: { show: false }, size: 40, ...REWARDS },
      ],
      series: [
        {},
        { label: say.rewardEach, paths: () => null, points: { show: true, size: 6, width: 0, fill: color("--soft") } },
        { label: fill(say.rewardLine, { n: MEAN_OF }), stroke: color("--accent"), width: 2, points: { show: false } },
      ],
    }),
    [tongue],
  );
  return (
    <section>
      <h2>{say.reward}</h2>
      {values.length === 0 ? (
        <p class="hint">{say.rewardNone}</p>
      ) : (
        <>
          <Plot data={data} options={options} label={say.reward} />
          <p class="hint">
            <span class="dot round" /> {say.rewardEach} <span class="dot line" /> {fill(say.rewardLine, { n: MEAN_OF })}
          </p>
        </>
      )}
    </section>
  );
}

function Latency({ stories, tried }: { stories: api.Story[]; tried: boolean }) {
  const say = words();
  const whole = stories.filter((one) => ["received", ...STAGES].every((name) => name in one.times)).slice(-LATENCY_OF);
  if (whole.length === 0)
    return (
      <section>
        <h2>{say.latency}</h2>
        <p class="hint">{say.latencyNone}</p>
      </section>
    );
  const names = ["received", ...STAGES];
  const name = (stage: (typeof STAGES)[number]): string =>
    stage === "served" && tried ? say.tried : say.stages[stage];
  const parts = STAGES.map((name, i) =>
    Math.max(0, median(whole.map((one) => (one.times[name] as number) - (one.times[names[i] as string] as number)))),
  );
  const total = parts.reduce((a, b) => a + b, 0) || 1;
  const all = median(whole.map((one) => (one.times.served as number) - (one.times.received as number)));
  return (
    <section>
      <h2>{say.latency}</h2>
      <div class="bar" aria-hidden="true">
        {parts.map((part, i) => (
          <span key={STAGES[i]} class={`part part${i}`} style={{ flexGrow: part / total }} />
        ))}
      </div>
      <ul class="legend">
        {parts.map((part, i) => (
          <li key={STAGES[i]}>
            <span class={`dot part${i}`} /> {name(STAGES[i] as (typeof STAGES)[number])} {seconds(part)}
          </li>
        ))}
      </ul>
      <p class="hint">{fill(say.latencyOf, { n: whole.length, seconds: all.toFixed(2) })}</p>
    </section>
  );
}

function seconds(value: number): string {
  return value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`;
}

function Versions({ versions, refresh }: { versions: api.Versions | null; refresh: () => void }) {
  const say = words();
  const [fault, setFault] = useState("");
  if (versions === null) return null;
  const act = async (call: () => Promise<unknown>): Promise<void> => {
    try {
      setFault("");
      await call();
    } catch (error) {
      setFault(String((error as Error).message));
    }
    refresh();
  };
  const { serving, trial } = versions;
  const rows = [...versions.versions].reverse();
  const earlier = before(versions);
  const verdict = (one: api.Version): string => {
    const name = { published: say.published, refused: say.refused, nothing: say.nothing }[one.state] ?? one.state;
    const slow = one.slow ? `, ${one.slow.passed ? say.passed : say.failed}` : "";
    return `${name}${slow}${one.reason ? say.colon + reasonOf(one.reason) : ""}`;
  };
  const marks = (one: api.Version): string[] => [
    ...(one.version === serving ? [say.serving] : []),
    ...(one.version === trial?.candidate ? [say.candidate] : []),
    ...(one.version === versions.anchor ? [say.anchor] : []),
    ...(one.version === versions.current && ![serving, trial?.candidate].includes(one.version) ? [say.newest] : []),
  ];
  const kind = (one: api.Version): string =>
    one.version === serving ? "current" : one.version === trial?.candidate ? "tried" : "";
  return (
    <section>
      <h2>{say.versions}</h2>
      {versions.notices.map((one) => (
        <p key={one.name} class="verdict refused" role="status">
          {fill(say.collapse, { sign: one.text })}
        </p>
      ))}
      {trial && <Trial trial={trial} onEnd={() => void act(() => api.promote(trial.serving))} />}
      <p>
        <button type="button" disabled={earlier === null} onClick={() => void act(api.rollBack)}>
          {earlier === null ? say.roll : fill(say.rollTo, { n: earlier })}
        </button>
      </p>
      {fault && (
        <p class="fault" role="alert">
          {fault}
        </p>
      )}
      <div class="scroll">
        <table class="lineage">
          <tbody>
            {rows.slice(0, SHOWN).map((one) => (
              <tr key={one.version} class={kind(one)}>
                <th scope="row">
                  {fill(say.versionOf, { n: one.version })}
                  {marks(one).map((mark) => (
                    <span key={mark} class="mark">
                      {mark}
                    </span>
                  ))}
                </th>
                <td class="wide">
                  {one.parent === null ? say.first : fill(say.lineage, { parent: one.parent })}
                  {" · "}
                  {fill(say.events, { n: one.events })}
                  {" · "}
                  {verdict(one)}
                  {one.trial && <p class={`verdict ${one.trial.verdict}`}>{ended(one.trial)}</p>}
                </td>
                <td>
                  {one.version !== serving && one.on_disk && (
                    <button type="button" class="quiet" onClick={() => void act(() => api.promote(one.version))}>
                      {say.promote}
                    </button>
                  )}
                  {one.state === "published" && !one.on_disk && <span class="hint">{say.gone}</span>}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

/** What is on trial, and how far each of the two bets is from deciding it. */
function Trial({ trial, onEnd }: { trial: api.Trial; onEnd: () => void }) {
  const say = words();
  if (trial.candidate === null)
    return <p class="hint">{fill(say.trialNone, { promoted: trial.promoted, refused: trial.refused })}</p>;
  const needed = Number(trial.needed.toPrecision(3));
  const bets = [
    { name: fill(say.trialFor, { margin: trial.margin }), value: trial.e_better, kind: "for" },
    { name: say.trialAgainst, value: trial.e_worse, kind: "against" },
  ];
  return (
    <div class="trial">
      <p>{trialOf(trial)}</p>
      <p class="hint">{fill(say.trialRule, { needed })}</p>
      <div class="evidence">
        {bets.map((bet) => (
          <Evidence key={bet.kind} {...bet} needed={needed} />
        ))}
      </div>
      <p class="hint">{pairsOf(trial)}</p>
      <button type="button" onClick={onEnd}>
        {say.trialEnd}
      </button>
    </div>
  );
}

function Evidence({ name, value, kind, needed }: { name: string; value: number; kind: string; needed: number }) {
  const far = progress(value, needed);
  const text = fill(words().trialOf, { value: eValue(value), needed });
  return (
    <>
      <span class="bet" id={`bet-${kind}`}>
        {name}
      </span>
      <span class={`track ${kind}`}>
        <meter aria-labelledby={`bet-${kind}`} aria-valuetext={text} value={far} />
        <span style={{ width: `${100 * far}%` }} />
      </span>
      <span class="number" aria-hidden="true">
        {text}
      </span>
    </>
  );
}

/** Shown where several teach. */
function Sources({ sources }: { sources: api.Source[] }) {
  const say = words();
  const titles = [say.source, say.said, say.taught, say.meanReward, say.reputation, say.influence];
  const number = (value: number | null) => (value === null ? "–" : minus(value.toFixed(2)));
  return (
    <section>
      <h2>{say.sources}</h2>
      <div class="scroll">
        <table class="sources">
          <thead>
            <tr>
              {titles.map((title) => (
                <th key={title} scope="col">
                  {title}
                </th>
              ))}
            </tr>
          </thead>
          <tbody>
            {sources.slice(0, SHOWN).map((one) => (
              <tr key={one.source}>
                <th scope="row">{one.source}</th>
                <td>{one.events}</td>
                <td>{one.used}</td>
                <td>{number(one.reward)}</td>
                <td>{number(one.reputation)}</td>
                <td>{one.influence === null ? "–" : `${Math.round(100 * one.influence)}%`}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function Log({ stories }: { stories: api.Story[] }) {
  const say = words();
  const [kind, setKind] = useState("");
  const [state, setState] = useState("");
  const [source, setSource] = useState("");
  const sources = [...new Set(stories.map((one) => one.source))].sort();
  const found = stories
    .filter(
      (one) => (!kind || one.kind === kind) && (!state || one.state === state) && (!source || one.source === source),
    )
    .reverse();
  return (
    <section>
      <h2>{say.log}</h2>
      <div class="filters">
        <Choice value={kind} onChange={setKind} all={say.allKinds} options={Object.entries(say.kind)} />
        <Choice value={state} onChange={setState} all={say.allStates} options={Object.entries(say.state)} />
        <Choice value={source} onChange={setSource} all={say.allSources} options={sources.map((s) => [s, s])} />
      </div>
      {found.length === 0 && <p class="hint">{say.logNone}</p>}
      <ul class="log">
        {found.slice(0, SHOWN).map((one) => (
          <li key={one.id} class={one.state}>
            <details>
              <summary>
                <time dateTime={new Date(1000 * (one.times.received ?? 0)).toISOString()}>
                  {new Date(1000 * (one.times.received ?? 0)).toLocaleTimeString()}
                </time>{" "}
                <span class="kind">{say.kind[one.kind]}</span> <span class="value">{shown(one)}</span>{" "}
                <span class="badge">{say.state[one.state]}</span> <span class="moved">{moved(one)}</span>
              </summary>
              <p>
                {say.what}: {told(one)}
              </p>
              <pre>{JSON.stringify(one, null, 1)}</pre>
            </details>
          </li>
        ))}
      </ul>
    </section>
  );
}

function shown(one: api.Story): string {
  if (typeof one.value === "number") return minus(String(one.value));
  const value = String(one.value ?? "");
  return value.length > 40 ? `${value.slice(0, 39)}…` : value;
}

function Choice({
  value,
  onChange,
  all,
  options,
}: {
  value: string;
  onChange: (value: string) => void;
  all: string;
  options: [string, string][];
}) {
  return (
    <select aria-label={all} value={value} onChange={(event) => onChange(event.currentTarget.value)}>
      <option value="">{all}</option>
      {options.map(([name, title]) => (
        <option key={name} value={name}>
          {title}
        </option>
      ))}
    </select>
  );
}
