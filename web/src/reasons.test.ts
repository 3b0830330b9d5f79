import { afterEach, expect, test } from "vitest";
import { language, switchLanguage } from "./i18n";
import { reasonOf } from "./reasons";

afterEach(() => {
  if (language.get() !== "en") switchLanguage();
});

test("reasons stay as they came in English", () => {
  expect(reasonOf("score outside -1 to 1")).toBe("score outside -1 to 1");
});

test("reasons are told in Chinese with what the server filled in, alone and several at once", () => {
  switchLanguage();
  expect(reasonOf("score outside 1 to 5")).toBe("评分不在 1 到 5 之间");
  expect(reasonOf("retracted; pairs of the same text")).toBe("已被撤回；两条回答相同");
  expect(reasonOf("the gate refused the version: the KL to the parent is 0.2, over 0.1; bleu is 3, under 4")).toBe(
    "闸门拒绝了这个版本：到上一版本的 KL 是 0.2，超过 0.1；bleu 是 3，低于 4",
  );
  expect(
    reasonOf("what this source says of answers contradicts what others say of them; it counts again when they agree"),
  ).toMatch(/^这个来源/);
});

test("a reason that nobody translated is told as it came", () => {
  switchLanguage();
  expect(reasonOf("something new")).toBe("something new");
  expect(reasonOf("")).toBe("");
});
