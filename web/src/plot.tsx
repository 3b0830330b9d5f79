/** uPlot in a component: drawn anew for other data, as wide as its place. */

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

export function Plot({
  data,
  options,
  label,
}: {
  data: uPlot.AlignedData;
  options: Omit<uPlot.Options, "width" | "height">;
  label: string;
}) {
  const place = useRef<HTMLDivElement>(null);
  const drawn = useRef<uPlot | null>(null);
  useEffect(() => {
    const box = place.current;
    if (box === null) return;
    const size = () => ({ width: box.clientWidth, height: 200 });
    drawn.current = new uPlot({ ...options, ...size() }, data, box);
    const watcher = new ResizeObserver(() => drawn.current?.setSize(size()));
    watcher.observe(box);
    return () => {
      watcher.disconnect();
      drawn.current?.destroy();
    };
    // other data is drawn below without starting over
  }, [options]);
  useEffect(() => drawn.current?.setData(data), [data]);
  return <div class="plot" ref={place} role="img" aria-label={label} />;
}

/** A colour of the style sheet, as a canvas needs it. */
export function color(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
