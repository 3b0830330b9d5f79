import { afterEach, expect, test } from "vitest";
import type { Trial, Verdict, Version, Versions } from "./api";
import { language, switchLanguage } from "./i18n";
import { before, ended, eValue, pairsOf, percent, progress, signed, trialOf } from "./trial";

const trial: Trial = {
  serving: 3,
  candidate: 5,
  kind: "canary",
  share: 0.1,
  rated: { serving: 40, candidate: 12 },
  pairs: 12,
  difference: 0.314,
  e_better: 3.26,
  e_worse: 0.04,
  needed: 20,
  margin: 0.1,
  most_pairs: 1000,
  promoted: 0,
  refused: 0,
};

const verdict: Verdict = {
  verdict: "promoted",
  kind: "canary",
  against: 3,
  alpha: 0.05,
  margin: 0.1,
  pairs: 9,
  difference: 0.8,
  e_better: 21.7,
  e_worse: 0.2,
};

afterEach(() => {
  if (language.get() !== "en") switchLanguage();
});

test("evidence is told on a log scale and never rounded up to what decides", () => {
  expect(progress(1, 20)).toBe(0);
  expect(progress(Math.sqrt(20), 20)).toBeCloseTo(0.5);
  expect(progress(0.3, 20)).toBe(0);
  expect(progress(50, 20)).toBe(1);
  expect([0.04, 0.97, 3.26, 19.99, 1234.5, 2.4e9].map(eValue)).toEqual(["<0.1", "0.9", "3.2", "19", "1234", "2e9"]);
});

test("numbers have a sign that is a sign, and shares no noise", () => {
  expect([0.314, -0.5, 0].map(signed)).toEqual(["+0.31", "−0.50", "+0.00"]);
  expect([0.1, 0.07, 0.005, 1].map(percent)).toEqual(["10%", "7%", "0.5%", "100%"]);
});

test("a trial is told in both languages: which version, on whom, and how far it is", () => {
  expect(trialOf(trial)).toBe(
    "Version 5 is on trial against version 3: it answers 10% of the users, and their ratings decide.",
  );
  expect(trialOf({ ...trial, kind: "shadow" })).toContain("unseen beside 10% of the answers");
  expect(pairsOf(trial)).toBe(
    "pairs of ratings: 12 of at most 1000 · mean difference +0.31 · rated answers: 12 by version 5, 40 by version 3",
  );
  expect(pairsOf({ ...trial, pairs: 0, difference: null })).toContain("at most 1000 · rated answers");
  expect(pairsOf({ ...trial, kind: "shadow" })).not.toContain("rated answers");
  switchLanguage();
  expect(trialOf(trial)).toBe("版本 5 正在试用，与版本 3 对照：它回答 10% 的用户，由他们的评价决定。");
  expect(pairsOf(trial)).toContain("成对评价：12 / 最多 1000");
});

test("a verdict says what was found, and on what evidence", () => {
  expect(ended(verdict)).toBe(
    "trial won: not worse than version 3 by 0.1 or more, after 9 pairs (mean difference +0.80, evidence 21 of 20)",
  );
  const refused: Verdict = { ...verdict, verdict: "refused", difference: -0.8, e_better: 0.1, e_worse: 30 };
  expect(ended(refused)).toBe(
    "trial lost: worse than version 3, after 9 pairs (mean difference −0.80, evidence 30 of 20)",
  );
  expect(ended({ ...refused, e_worse: 19.99 })).toContain("trial lost: undecided against version 3");
  switchLanguage();
  expect(ended(refused)).toBe("试用未通过：9 对之后比版本 3 差（平均差 −0.80，证据 30 / 20）");
});

test("rolling back goes to an ancestor of what serves, not of what is on trial", () => {
  const row = (version: number, parent: number | null, on_disk = true): Version => ({
    version,
    parent,
    state: "published",
    reason: "",
    events: 1,
    used: 1,
    on_disk,
    slow: null,
    trial: null,
  });
  const all: Versions = {
    current: 5,
    anchor: 0,
    serving: 3,
    trial: null,
    notices: [],
    versions: [row(0, null), row(1, 0), row(2, 1, false), row(3, 2), row(4, 1), row(5, 3)],
  };
  expect(before(all)).toBe(3);
  expect(before({ ...all, trial })).toBe(1);
  expect(before({ ...all, current: 0 })).toBe(null);
});
