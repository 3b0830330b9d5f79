import { afterEach, expect, test, vi } from "vitest";
import * as api from "./api";

afterEach(() => {
  vi.unstubAllGlobals();
  sessionStorage.clear();
});

function answers(...chunks: string[]): Response {
  const encoder = new TextEncoder();
  return new Response(
    new ReadableStream({
      start(controller) {
        for (const chunk of chunks) controller.enqueue(encoder.encode(chunk));
        controller.close();
      },
    }),
  );
}

test("a streamed answer is joined from chunks that break anywhere", async () => {
  const fetched = vi.fn(async () =>
    answers(
      'data: {"id":"chatcmpl-1","operant":{"version":3,"cut_messages":2},"choices":[{"delta":{"content":"Gu"}}]}\n',
      '\ndata: {"id":"chatcmpl-1","choices":[{"delta":{"content":"ten Tag"}}]}\n\ndata: [DO',
      "NE]\n\n",
    ),
  );
  vi.stubGlobal("fetch", fetched);
  const seen: string[] = [];
  const answer = await api.chat([{ role: "user", content: "hi" }], (now) => seen.push(now.text));
  expect(answer).toEqual({ id: "chatcmpl-1", text: "Guten Tag", version: 3, cut: 2 });
  expect(seen.at(-1)).toBe("Guten Tag");
});

test("a refusal carries the server's own words", async () => {
  vi.stubGlobal("fetch", async () => new Response('{"error":{"message":"give a valid API key"}}', { status: 401 }));
  await expect(api.versions()).rejects.toMatchObject({ status: 401, message: "give a valid API key" });
});

test("the key goes with every call, and only where there is one", async () => {
  const fetched = vi.fn(async (_: string, __: RequestInit) => new Response("{}"));
  vi.stubGlobal("fetch", fetched);
  await api.health();
  api.useKey(" op-secret ");
  await api.health();
  const sent = fetched.mock.calls.map(([, options]) => (options.headers as Record<string, string>).Authorization);
  expect(sent).toEqual([undefined, "Bearer op-secret"]);
});

test("each click has a key of its own, so that a click sent twice counts once and two clicks twice", async () => {
  const fetched = vi.fn(async (_: string, __: RequestInit) => new Response('{"id":"fb-1"}'));
  vi.stubGlobal("fetch", fetched);
  await api.say({ completion_id: "c", kind: "thumb", value: 1 });
  await api.say({ completion_id: "c", kind: "thumb", value: 1 });
  const keys = fetched.mock.calls.map(([, options]) => JSON.parse(String(options.body)).idempotency_key);
  expect(new Set(keys).size).toBe(2);
});

test("stories are fetched to the last page", async () => {
  const pages = [
    { data: [{ offset: 1 }, { offset: 2 }], has_more: true },
    { data: [{ offset: 3 }], has_more: false },
  ];
  const asked: string[] = [];
  vi.stubGlobal("fetch", async (path: string) => {
    asked.push(path);
    return new Response(JSON.stringify(pages.shift()));
  });
  expect((await api.stories(0)).map((one) => one.offset)).toEqual([1, 2, 3]);
  expect(asked[1]).toContain("after=2");
});
