import { describe, expect, test } from "vitest";
import { asked, codePoints, events, marked, median, offsetIn, runningMean, scaled } from "./text";

describe("places in a text", () => {
  test("are counted in code points, as the server counts them", () => {
    expect(codePoints("👍强化a", "👍强化a".length)).toBe(4);
    expect(codePoints("👍强化a", 2)).toBe(1);
  });

  test("a selection loses the white space at its ends", () => {
    expect(marked("so good  indeed", 2, 9)).toEqual({ start: 3, end: 7, text: "good" });
    expect(marked("so good", 7, 3)).toEqual({ start: 3, end: 7, text: "good" });
    expect(marked("a  b", 1, 3)).toBeNull();
  });

  test("half of a character is the whole of it", () => {
    expect(marked("a👍b", 2, 3)).toEqual({ start: 1, end: 2, text: "👍" });
  });

  test("are found across the nodes of an element", () => {
    const box = document.createElement("p");
    box.append("one ", "two");
    document.body.append(box);
    expect(offsetIn(box, box.childNodes[1] as Node, 2)).toBe(6);
    expect(offsetIn(box, document.body, 0)).toBeNull();
  });
});

describe("server-sent events", () => {
  test("are taken when they are whole", () => {
    const first = events('data: {"a":1}\n\ndata: {"b"');
    expect(first.data).toEqual(['{"a":1}']);
    expect(events(`${first.rest}:2}\r\n\r\n: a comment\n\n`)).toEqual({ data: ['{"b":2}'], rest: "" });
  });
});

test("median and running mean", () => {
  expect(median([3, 1, 2])).toBe(2);
  expect(median([4, 1, 2, 3])).toBe(2.5);
  expect(median([])).toBeNaN();
  expect(runningMean([1, 3, 5], 2)).toEqual([1, 2, 4]);
});

test("a score stands on the scale of thumbs", () => {
  expect([1, 3, 5, 9].map((score) => scaled(score, 1, 5))).toEqual([-1, 0, 1, 1]);
});

test("an answer is written after what was said, without questions that got no answer", () => {
  const turns = (["a", "A", "b", "", "c"] as const).map((text, i) => ({
    role: i % 2 ? ("assistant" as const) : ("user" as const),
    text,
  }));
  expect(asked(turns, true).map((one) => one.content)).toEqual(["a", "A", "c"]);
  expect(asked(turns, false)).toEqual([{ role: "user", content: "c" }]);
});
