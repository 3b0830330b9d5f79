/** A value that components read and that draws them again when it is set. */

import { useEffect, useState } from "preact/hooks";

export interface Signal<T> {
  get(): T;
  set(value: T): void;
  listen(call: () => void): () => void;
}

export function signal<T>(begin: T): Signal<T> {
  let now = begin;
  const listeners = new Set<() => void>();
  return {
    get: () => now,
    set(value: T) {
      now = value;
      for (const call of listeners) call();
    },
    listen(call: () => void) {
      listeners.add(call);
      return () => listeners.delete(call);
    },
  };
}

export function useSignal<T>(source: Signal<T>): T {
  const [, draw] = useState(0);
  useEffect(() => source.listen(() => draw((n) => n + 1)), [source]);
  return source.get();
}

/** Counts what was learned here, so that what serves is looked at again at once. */
export const served = signal(0);
