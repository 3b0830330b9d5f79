/** Trials of versions in words: how far one is, and how one ended. */

import type { Trial, Verdict, Version, Versions } from "./api";
import { fill, words } from "./i18n";

/** How far an e-value is on its way to the one that decides, in [0, 1]: on a log scale, where bets add up. */
export function progress(evidence: number, needed: number): number {
  return Math.min(1, Math.max(0, Math.log(evidence) / Math.log(needed)));
}

/** An e-value, rounded down: what is short of its threshold does not read as if it had reached it. */
export function eValue(value: number): string {
  if (value < 0.1) return "<0.1";
  if (value < 10) return (Math.floor(10 * value) / 10).toFixed(1);
  return value < 1e6 ? String(Math.floor(value)) : value.toExponential(0).replace("+", "");
}

export function signed(value: number): string {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

/** A share as a percentage, without digits that say nothing. */
export function percent(share: number): string {
  return `${Number((100 * share).toPrecision(2))}%`;
}

/** What is tried against what, on whom, and who decides. */
export function trialOf(trial: Trial): string {
  const say = words();
  const how = trial.kind === "canary" ? say.trialCanary : say.trialShadow;
  return fill(say.trialSentence, {
    versions: fill(say.trial, { candidate: trial.candidate ?? "?", serving: trial.serving }),
    how: fill(how, { share: percent(trial.share) }),
  });
}

/** What the evidence is made of. */
export function pairsOf(trial: Trial): string {
  const say = words();
  return fill(trial.kind === "canary" ? say.trialRatings : say.trialAnswers, {
    pairs: trial.pairs,
    most: trial.most_pairs,
    mean: trial.difference === null ? "" : fill(say.trialMean, { difference: signed(trial.difference) }),
    candidate: trial.candidate ?? "?",
    serving: trial.serving,
    ours: trial.rated.candidate,
    theirs: trial.rated.serving,
  });
}

/** How a trial ended, and on what evidence. */
export function ended(verdict: Verdict): string {
  const say = words();
  const needed = Number((1 / verdict.alpha).toPrecision(3));
  const given = { against: verdict.against, pairs: verdict.pairs, margin: verdict.margin };
  const evidence = (value: number): string =>
    fill(say.trialEvidence, { difference: signed(verdict.difference), evidence: eValue(value), needed });
  if (verdict.verdict === "promoted") return fill(say.trialPromoted, given) + evidence(verdict.e_better);
  if (verdict.e_worse >= 1 / verdict.alpha) return fill(say.trialRefused, given) + evidence(verdict.e_worse);
  return fill(say.trialUndecided, given) + evidence(Math.max(verdict.e_better, verdict.e_worse));
}

/** The version that rolling back would serve: the nearest ancestor of what serves that is on disk; null without one. */
export function before(versions: Versions): number | null {
  const all = new Map(versions.versions.map((one) => [one.version, one]));
  let now: Version | undefined = all.get(versions.trial?.serving ?? versions.current);
  while (now !== undefined && now.parent !== null) {
    now = all.get(now.parent);
    if (now?.on_disk) return now.version;
  }
  return null;
}
