/** Text as the server counts it (Python code points) and as the browser does (UTF-16 units). */

/** How many code points the first `units` UTF-16 units of a text hold. */
export function codePoints(text: string, units: number): number {
  return [...text.slice(0, units)].length;
}

export interface Marked {
  start: number;
  end: number;
  text: string;
}

/** A selection [from, to) in UTF-16 units, without white space at its ends, in code points; null when it is empty. */
export function marked(text: string, from: number, to: number): Marked | null {
  let first = Math.max(0, Math.min(from, to));
  let last = Math.min(text.length, Math.max(from, to));
  while (first < last && /\s/.test(text[first] ?? "")) first++;
  while (last > first && /\s/.test(text[last - 1] ?? "")) last--;
  if (first === last) return null;
  // half of a character that UTF-16 writes as two is the whole of it
  if (isTail(text, first)) first--;
  if (isTail(text, last)) last++;
  return { start: codePoints(text, first), end: codePoints(text, last), text: text.slice(first, last) };
}

function isTail(text: string, at: number): boolean {
  const unit = text.charCodeAt(at);
  return unit >= 0xdc00 && unit <= 0xdfff;
}

/** Where a point of the document lies in the text of `root`, in UTF-16 units; null when it lies outside. */
export function offsetIn(root: Node, node: Node, offset: number): number | null {
  if (!root.contains(node)) return null;
  const range = document.createRange();
  range.setStart(root, 0);
  range.setEnd(node, offset);
  return range.toString().length;
}

/** The data of complete server-sent events in `buffer`, and what is left of it. */
export function events(buffer: string): { data: string[]; rest: string } {
  const parts = buffer.split(/\r?\n\r?\n/);
  const rest = parts.pop() ?? "";
  const data = parts.map((part) =>
    part
      .split(/\r?\n/)
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(5).replace(/^ /, ""))
      .join("\n"),
  );
  return { data: data.filter((one) => one !== ""), rest };
}

export function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (sorted.length === 0) return Number.NaN;
  return sorted.length % 2
    ? (sorted[middle] as number)
    : ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}

/** The mean of the last `width` values at each place; null before the first. */
export function runningMean(values: number[], width: number): number[] {
  let sum = 0;
  return values.map((value, i) => {
    sum += value - (i >= width ? (values[i - width] as number) : 0);
    return sum / Math.min(i + 1, width);
  });
}

/** A score between low and high on the scale of thumbs, from −1 to 1. */
export function scaled(score: number, low: number, high: number): number {
  return Math.min(1, Math.max(-1, (2 * (score - low)) / (high - low) - 1));
}

/** A number's text with the sign that is one. */
export function minus(number: string): string {
  return number.replace("-", "−");
}

export interface Said {
  role: "user" | "assistant";
  text: string;
}

/** The messages that an answer to the last of these turns is written after. A question that got no answer is left out
 * with it; without `conversation` the last question stands alone. */
export function asked(turns: Said[], conversation: boolean): { role: "user" | "assistant"; content: string }[] {
  const last = turns.length - 1;
  return turns
    .filter(
      (one, i) => i === last || (conversation && one.text !== "" && (one.role !== "user" || !!turns[i + 1]?.text)),
    )
    .map((one) => ({ role: one.role, content: one.text }));
}
