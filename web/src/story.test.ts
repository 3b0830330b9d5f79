import { afterEach, expect, test } from "vitest";
import type { Story } from "./api";
import { fill, language, switchLanguage } from "./i18n";
import { settled, told } from "./story";

const used: Story = {
  id: "fb-1",
  completion_id: "c",
  kind: "thumb",
  value: 1,
  span: null,
  source: "owner",
  offset: 1,
  state: "used",
  reason: "",
  waiting_for: "",
  version: 12,
  advantage: 1,
  logprob_before: -31.24,
  logprob_after: -27.9,
  times: {},
  seconds: 0.84,
};

afterEach(() => {
  if (language.get() !== "en") switchLanguage();
});

test("what a click did is told with its time, its version and what it moved", () => {
  expect(told(used)).toBe("Learned in 0.8 s, version 12; log-probability of this answer: −31.2 → −27.9");
  expect(told({ ...used, kind: "edit" })).toContain("your version: −31.2");
  expect(told({ ...used, logprob_before: -0.3, logprob_after: -0.04 })).toContain("answer: −0.3 → −0.04");
  expect(told({ ...used, reason: "at half its weight" })).toMatch(/−27.9; at half its weight$/);
  switchLanguage();
  expect(told(used)).toBe("0.8 秒内学会，版本 12；此回答的对数概率：−31.2 → −27.9");
});

test("what taught nothing says why", () => {
  expect(told({ ...used, state: "unused", reason: "advantage 0" })).toBe("Not used: advantage 0");
  expect(told({ ...used, state: "pending" })).toContain("Waiting");
  const waits = { ...used, state: "pending" as const, waiting_for: "the learner, which is starting" };
  expect(told(waits)).toContain("(the learner, which is starting)");
});

test("a story is over when it was not used, or is served", () => {
  expect(settled(used)).toBe(true);
  expect(settled({ ...used, seconds: null })).toBe(false);
  expect(settled({ ...used, state: "unused", seconds: null })).toBe(true);
  expect(settled({ ...used, state: "pending" })).toBe(false);
});

test("only known names are filled in", () => {
  expect(fill("{a} and {b}", { a: 1 })).toBe("1 and {b}");
});
