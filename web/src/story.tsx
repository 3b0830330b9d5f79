/** What a click did, in a sentence. */

import type { Kind, Story } from "./api";
import { fill, words } from "./i18n";
import { minus } from "./text";

/** An event as soon as it is acknowledged; its story comes later. */
export interface Clicked {
  id: string;
  kind: Kind;
  story: Story | null;
}

export function told(one: Story): string {
  const say = words();
  if (one.state === "pending") return say.pending;
  if (one.state === "unused") return fill(say.unused, { reason: one.reason });
  if (one.state === "superseded") return fill(say.superseded, { reason: one.reason ? ` (${one.reason})` : "" });
  const version = one.version ?? "?";
  const when =
    one.seconds === null
      ? fill(say.learnedUnserved, { version })
      : fill(say.learned, { seconds: one.seconds.toFixed(1), version });
  if (one.logprob_before === null || one.logprob_after === null) return when;
  const what = one.kind === "edit" ? say.whatEdit : one.kind === "span" ? say.whatSpan : say.whatText;
  const moved = fill(say.moved, {
    what,
    before: minus(one.logprob_before.toFixed(1)),
    after: minus(one.logprob_after.toFixed(1)),
  });
  return fill(say.joined, { when, moved });
}

export function settled(one: Story): boolean {
  return one.state !== "pending" && (one.state !== "used" || one.seconds !== null);
}
