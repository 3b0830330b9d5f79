/** The server's public API, and nothing else of it. */

import { events } from "./text";

export interface Message {
  role: "user" | "assistant";
  content: string;
}

export type Kind = "score" | "thumb" | "edit" | "comparison" | "span" | "comment" | "retract";
export type State = "pending" | "used" | "superseded" | "unused";

export interface Feedback {
  completion_id: string;
  kind: Kind;
  value?: number | string | null;
  span?: { start: number; end: number; text: string };
}

export interface Story {
  id: string;
  completion_id: string;
  kind: Kind;
  value: number | string | null;
  span: { start: number; end: number } | null;
  source: string;
  offset: number;
  state: State;
  reason: string;
  waiting_for: string;
  version: number | null;
  advantage: number | null;
  logprob_before: number | null;
  logprob_after: number | null;
  times: Record<string, number>;
  seconds: number | null;
}

export interface Version {
  version: number;
  parent: number | null;
  state: string;
  reason: string;
  events: number;
  used: number;
  on_disk: boolean;
  slow: { passed: boolean; reason?: string } | null;
  trial: Verdict | null;
}

/** How far the trial of a version is; candidate is null while none is tried. */
export interface Trial {
  serving: number;
  candidate: number | null;
  kind: "canary" | "shadow";
  share: number;
  rated: { serving: number; candidate: number };
  pairs: number;
  difference: number | null;
  e_better: number;
  e_worse: number;
  needed: number;
  margin: number;
  most_pairs: number;
  promoted: number;
  refused: number;
}

/** How the trial of a version ended. */
export interface Verdict {
  verdict: "promoted" | "refused";
  kind: "canary" | "shadow";
  against: number;
  alpha: number;
  margin: number;
  pairs: number;
  difference: number;
  e_better: number;
  e_worse: number;
}

/** What a report calls a sign of collapse. */
export interface Notice {
  kind: "collapse" | "idle";
  name: string;
  text: string;
}

export interface Versions {
  current: number;
  anchor: number;
  serving: number;
  trial: Trial | null;
  notices: Notice[];
  versions: Version[];
}

export interface Source {
  source: string;
  events: number;
  used: number;
  reward: number | null;
  reputation: number | null;
  influence: number | null;
}

export interface Health {
  model: string;
  version: number;
  learner: string;
}

export interface Scores {
  low: number;
  high: number;
}

/** What the model is like. conversation: it was taught to take earlier turns into account. */
export interface Model {
  scores: Scores;
  conversation: boolean;
}

/** A refusal by the server, in its words. */
export class Refused extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

const KEY = "operant.key";

export function key(): string {
  return sessionStorage.getItem(KEY) ?? "";
}

/** Kept as long as the tab is open. */
export function useKey(value: string): void {
  sessionStorage.setItem(KEY, value.trim());
}

function headers(): Record<string, string> {
  const given = key();
  return { "Content-Type": "application/json", ...(given ? { Authorization: `Bearer ${given}` } : {}) };
}

async function refusal(response: Response): Promise<Refused> {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not the server's own words: a proxy's, perhaps
  }
  return new Refused(response.status, message);
}

async function call<T>(method: string, path: string, body?: unknown): Promise<T> {
  const response = await fetch(path, {
    method,
    headers: headers(),
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  if (!response.ok) throw await refusal(response);
  return (await response.json()) as T;
}

/** cut: how many of the chat's oldest messages were left out, as it is longer than the model's context. */
export interface Answer {
  id: string;
  text: string;
  version: number | null;
  cut: number;
}

/** Chat with streaming: `onText` gets what is there so far. */
export async function chat(
  messages: Message[],
  onText: (answer: Answer) => void,
  signal?: AbortSignal,
): Promise<Answer> {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify({ model: "default", messages, stream: true }),
    ...(signal ? { signal } : {}),
  });
  if (!response.ok || response.body === null) throw await refusal(response);
  const answer: Answer = { id: "", text: "", version: null, cut: 0 };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const found = events(buffer + value);
    buffer = found.rest;
    for (const data of found.data) {
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refused(500, chunk.error.message);
      answer.id ||= chunk.id;
      answer.version ??= chunk.operant?.version ?? null;
      answer.cut ||= chunk.operant?.cut_messages ?? 0;
      answer.text += chunk.choices?.[0]?.delta?.content ?? "";
    }
    onText({ ...answer });
  }
  return answer;
}

export function say(feedback: Feedback): Promise<{ id: string; state: State; duplicate: boolean }> {
  return call("POST", "/v1/feedback", { ...feedback, idempotency_key: crypto.randomUUID?.() ?? `${Math.random()}` });
}

/** What became of an event; waits up to `wait` seconds until that is known. */
export function story(id: string, wait: number): Promise<Story> {
  return call("GET", `/v1/feedback/${encodeURIComponent(id)}?wait=${wait}`);
}

export async function stories(after: number): Promise<Story[]> {
  const all: Story[] = [];
  for (;;) {
    const page: { data: Story[]; has_more: boolean } = await call(
      "GET",
      `/v1/feedback?limit=1000&after=${all.at(-1)?.offset ?? after}`,
    );
    all.push(...page.data);
    if (!page.has_more) return all;
  }
}

export async function sources(): Promise<Source[]> {
  const told: { data: Source[] } = await call("GET", "/v1/sources");
  return told.data;
}

export const versions = (): Promise<Versions> => call("GET", "/v1/versions");
export const rollBack = (): Promise<unknown> => call("POST", "/v1/versions/rollback");
export const promote = (version: number): Promise<unknown> => call("POST", `/v1/versions/${version}/promote`);
export const health = (): Promise<Health> => call("GET", "/health");

export async function model(): Promise<Model> {
  const told: { operant?: { scores?: [number, number]; conversation?: boolean } } = await call(
    "GET",
    "/v1/models/default",
  );
  const [low, high] = told.operant?.scores ?? [0, 1];
  return { scores: { low, high }, conversation: told.operant?.conversation ?? true };
}
