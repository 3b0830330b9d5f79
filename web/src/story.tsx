/** What a click did, in a sentence. */

import type { Kind, Story } from "./api";
import { fill, words } from "./i18n";
import { reasonOf } from "./reasons";
import { minus } from "./text";

/** An event as soon as it is acknowledged; its story comes later. */
export interface Clicked {
  id: string;
  kind: Kind;
  story: Story | null;
}

export function told(one: Story): string {
  const say = words();
  const reason = reasonOf(one.reason);
  if (one.state === "pending")
    return say.pending + (one.waiting_for ? fill(say.brackets, { text: reasonOf(one.waiting_for) }) : "");
  if (one.state === "unused") return fill(say.unused, { reason });
  if (one.state === "superseded")
    return fill(say.superseded, { reason: reason ? fill(say.brackets, { text: reason }) : "" });
  const version = one.version ?? "?";
  const when =
    one.seconds === null
      ? fill(say.learnedUnserved, { version })
      : fill(say.learned, { seconds: one.seconds.toFixed(1), version });
  const what = one.kind === "edit" ? say.whatEdit : one.kind === "span" ? say.whatSpan : say.whatText;
  const change = moved(one);
  const parts = [when, ...(change ? [fill(say.moved, { what, change })] : []), ...(reason ? [reason] : [])];
  return parts.join(say.semicolon);
}

/** From which log-probability to which the text went; "" where nothing was learned of it. */
export function moved(one: Story): string {
  if (one.state !== "used" || one.logprob_before === null || one.logprob_after === null) return "";
  return `${nats(one.logprob_before)} → ${nats(one.logprob_after)}`;
}

/** A log-probability for a person: −0.04 is 96% and not the certainty that −0.0 would be. */
function nats(logprob: number): string {
  return minus(logprob.toFixed(logprob <= -0.1 ? 1 : 2));
}

export function settled(one: Story): boolean {
  return one.state !== "pending" && (one.state !== "used" || one.seconds !== null);
}
