/** Drawn, not typed: an emoji may lack its font. */

const paths = {
  up: "M7 21H4a1 1 0 0 1-1-1v-8a1 1 0 0 1 1-1h3zm0-10 4-8c1.5 0 2.5 1 2.5 2.5V9H19a2 2 0 0 1 2 2.3l-1.2 7.5A2.5 2.5 0 0 1 17.3 21H7",
  down: "M17 3h3a1 1 0 0 1 1 1v8a1 1 0 0 1-1 1h-3zm0 10-4 8c-1.5 0-2.5-1-2.5-2.5V15H5a2 2 0 0 1-2-2.3l1.2-7.5A2.5 2.5 0 0 1 6.7 3H17",
  edit: "M4 20h4L19.5 8.5a2.1 2.1 0 0 0-3-3L5 17v3zM14.5 7.5l3 3",
  again: "M20 12a8 8 0 1 1-2.3-5.7M20 3v5h-5",
  send: "M4 12 20 4l-5 16-3.5-6.5zM11.5 13.5 20 4",
  stop: "M7 7h10v10H7z",
  undo: "M9 7H15a5 5 0 0 1 0 10H7M9 3 5 7l4 4",
  star: "M12 3.5l2.6 5.3 5.9.9-4.2 4.1 1 5.8-5.3-2.8-5.3 2.8 1-5.8L3.5 9.7l5.9-.9z",
};

export function Icon({ name }: { name: keyof typeof paths }) {
  return (
    <svg viewBox="0 0 24 24" width="20" height="20" aria-hidden="true" class="icon">
      <path d={paths[name]} />
    </svg>
  );
}
