/** The chat: answers stream in, and everything that can be said about one of them stands below it. */

import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import { fill, words } from "./i18n";
import { Icon } from "./icons";
import { served, signal, useSignal } from "./state";
import { type Clicked, settled, told } from "./story";
import { asked, type Marked, marked, offsetIn } from "./text";

interface Turn {
  role: "user" | "assistant";
  text: string;
  id: string;
  version: number | null;
  cut: number;
  fault: string;
  clicks: Clicked[];
  rated: number | null;
  other: Turn | null;
}

const turns = signal<Turn[]>([]);
const busy = signal(false);
const model = signal<api.Model>({ scores: { low: 0, high: 1 }, conversation: true });
let stopping: AbortController | null = null;

function turn(role: Turn["role"], text: string): Turn {
  return { role, text, id: "", version: null, cut: 0, fault: "", clicks: [], rated: null, other: null };
}

function draw(): void {
  turns.set([...turns.get()]);
}

/** What an answer is written after: the question alone where the model takes nothing else into account. */
function history(answer: Turn): api.Message[] {
  const all = turns.get();
  return asked(all.slice(0, all.indexOf(answer)), model.get().conversation);
}

async function write(answer: Turn, messages: api.Message[]): Promise<void> {
  stopping = new AbortController();
  busy.set(true);
  try {
    await api.chat(
      messages,
      (now) => {
        Object.assign(answer, now);
        draw();
      },
      stopping.signal,
    );
  } catch (error) {
    if (!(error instanceof DOMException && error.name === "AbortError"))
      answer.fault = String((error as Error).message);
  } finally {
    busy.set(false);
    draw();
  }
}

async function ask(text: string): Promise<void> {
  const answer = turn("assistant", "");
  turns.set([...turns.get(), turn("user", text), answer]);
  await write(answer, history(answer));
}

async function again(answer: Turn): Promise<void> {
  answer.other = turn("assistant", "");
  draw();
  await write(answer.other, history(answer));
}

async function say(about: Turn, feedback: Omit<api.Feedback, "completion_id">): Promise<void> {
  try {
    about.fault = "";
    const receipt = await api.say({ completion_id: about.id, ...feedback });
    const click: Clicked = { id: receipt.id, kind: feedback.kind, story: null };
    about.clicks.unshift(click);
    draw();
    for (let tries = 0; tries < 12 && !(click.story && settled(click.story)); tries++) {
      click.story = await api.story(click.id, tries ? 10 : 1); // first, what it waits for
      draw();
      if (settled(click.story)) served.set(served.get() + 1);
    }
  } catch (error) {
    about.fault = String((error as Error).message);
    draw();
  }
}

export function Chat() {
  const all = useSignal(turns);
  const writing = useSignal(busy);
  const { conversation } = useSignal(model);
  const say = words();
  const end = useRef<HTMLDivElement>(null);
  const last = all.at(-1);
  useEffect(() => {
    api.model().then(model.set, () => undefined);
  }, []);
  // scrolls when the last answer has grown
  useEffect(
    () => end.current?.scrollIntoView({ block: "end" }),
    [all.length, last?.text.length, last?.other?.text.length],
  );
  return (
    <main class="chat">
      <div class="turns" aria-live="polite">
        {all.length === 0 && <p class="welcome">{say.welcome}</p>}
        {!conversation && <p class="hint">{say.alone}</p>}
        {all.map((one, i) =>
          one.role === "user" ? (
            <div class="turn user" key={i}>
              {one.text}
            </div>
          ) : (
            <Answer key={i} answer={one} last={i === all.length - 1} writing={writing} />
          ),
        )}
        <div ref={end} />
      </div>
      <Ask writing={writing} some={all.length > 0} />
    </main>
  );
}

function Ask({ writing, some }: { writing: boolean; some: boolean }) {
  const [text, setText] = useState("");
  const box = useRef<HTMLTextAreaElement>(null);
  const say = words();
  useEffect(() => box.current?.focus(), []);
  const send = (): void => {
    const said = text.trim();
    if (said === "" || writing) return;
    setText("");
    void ask(said);
    box.current?.focus();
  };
  return (
    <form
      class="ask"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      {some && !writing && (
        <button type="button" class="quiet" onClick={() => turns.set([])}>
          {say.fresh}
        </button>
      )}
      <textarea
        ref={box}
        rows={1}
        value={text}
        placeholder={say.placeholder}
        aria-label={say.placeholder}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          event.preventDefault();
          send();
        }}
      />
      {writing ? (
        <button type="button" class="main" onClick={() => stopping?.abort()} aria-label={say.stop} title={say.stop}>
          <Icon name="stop" />
        </button>
      ) : (
        <button type="submit" class="main" disabled={text.trim() === ""} aria-label={say.send} title={say.send}>
          <Icon name="send" />
        </button>
      )}
    </form>
  );
}

function Answer({ answer, last, writing }: { answer: Turn; last: boolean; writing: boolean }) {
  const say_ = words();
  const two = answer.other;
  const choose = (better: Turn, worse: Turn): void => {
    const other = worse.id; // before the answer becomes the better one
    Object.assign(answer, { ...better, other: null, clicks: [] });
    draw();
    void say(answer, { kind: "comparison", value: other });
  };
  if (two === null) return <Single answer={answer} last={last} writing={writing} />;
  const done = !writing && answer.id !== "" && two.id !== "";
  return (
    <section class="pair">
      <p class="hint">{say_.keep}</p>
      <div class="two">
        {[answer, two].map((one, i) => (
          <article class="turn assistant" key={i}>
            <p class="said">{one.text || "…"}</p>
            {one.fault && <Fault text={one.fault} />}
            <button type="button" disabled={!done} onClick={() => choose(one, i === 0 ? two : answer)}>
              {say_.better}
            </button>
          </article>
        ))}
      </div>
      <button
        type="button"
        class="quiet"
        disabled={writing}
        onClick={() => {
          answer.other = null;
          draw();
        }}
      >
        {say_.cancel}
      </button>
    </section>
  );
}

function Single({ answer, last, writing }: { answer: Turn; last: boolean; writing: boolean }) {
  const [editing, setEditing] = useState(false);
  const text = useRef<HTMLParagraphElement>(null);
  const say_ = words();
  const done = answer.id !== "" && !(last && writing);
  return (
    <article class="turn assistant">
      {editing ? (
        <Editor
          text={answer.text}
          onDone={(said) => {
            setEditing(false);
            if (said !== null) void say(answer, { kind: "edit", value: said });
          }}
        />
      ) : (
        <p class="said" ref={text}>
          {answer.text || (answer.fault || done ? "" : "…")}
        </p>
      )}
      {answer.fault && <Fault text={answer.fault} />}
      {done && !editing && <Selected root={text} answer={answer} />}
      {done && !editing && (
        <div class="tools" role="toolbar" aria-label={say_.rate}>
          <Thumb answer={answer} value={1} />
          <Thumb answer={answer} value={-1} />
          <Stars answer={answer} />
          <button type="button" class="tool" title={say_.edit} aria-label={say_.edit} onClick={() => setEditing(true)}>
            <Icon name="edit" />
          </button>
          {last && (
            <button
              type="button"
              class="tool"
              title={say_.again}
              aria-label={say_.again}
              onClick={() => void again(answer)}
            >
              <Icon name="again" />
            </button>
          )}
          {answer.version !== null && <span class="version">{fill(say_.versionOf, { n: answer.version })}</span>}
        </div>
      )}
      {answer.cut > 0 && <p class="hint">{fill(say_.cut, { n: answer.cut })}</p>}
      <Clicks answer={answer} />
    </article>
  );
}

function Fault({ text }: { text: string }) {
  return (
    <p class="fault" role="alert">
      {text}
    </p>
  );
}

function Thumb({ answer, value }: { answer: Turn; value: 1 | -1 }) {
  const say_ = words();
  const name = value === 1 ? say_.good : say_.bad;
  return (
    <button
      type="button"
      class="tool"
      aria-pressed={answer.rated === value * 10}
      title={name}
      aria-label={name}
      onClick={() => {
        answer.rated = value * 10;
        void say(answer, { kind: "thumb", value });
      }}
    >
      <Icon name={value === 1 ? "up" : "down"} />
    </button>
  );
}

function Stars({ answer }: { answer: Turn }) {
  const say_ = words();
  const { low, high } = useSignal(model).scores;
  const lit = answer.rated !== null && answer.rated >= 1 && answer.rated <= 5 ? answer.rated : 0;
  return (
    <span class="stars">
      {[1, 2, 3, 4, 5].map((n) => (
        <button
          key={n}
          type="button"
          class={`tool star${n <= lit ? " lit" : ""}`}
          aria-label={fill(say_.score, { n })}
          title={fill(say_.score, { n })}
          onClick={() => {
            answer.rated = n;
            void say(answer, { kind: "score", value: low + ((n - 1) / 4) * (high - low) });
          }}
        >
          <Icon name="star" />
        </button>
      ))}
    </span>
  );
}

function Editor({ text, onDone }: { text: string; onDone: (said: string | null) => void }) {
  const [now, setNow] = useState(text);
  const box = useRef<HTMLTextAreaElement>(null);
  const say_ = words();
  useEffect(() => box.current?.focus(), []);
  return (
    <div class="editor">
      <textarea
        ref={box}
        aria-label={say_.editing}
        rows={Math.min(12, 2 + Math.ceil(text.length / 60))}
        value={now}
        onInput={(event) => setNow(event.currentTarget.value)}
        onKeyDown={(event) => event.key === "Escape" && onDone(null)}
      />
      <div class="tools">
        <button type="button" class="main" disabled={now === text || now.trim() === ""} onClick={() => onDone(now)}>
          {say_.save}
        </button>
        <button type="button" onClick={() => onDone(null)}>
          {say_.cancel}
        </button>
      </div>
    </div>
  );
}

/** A bar for the words that are selected in an answer. A tap must not drop the selection, so it acts on pointerdown. */
function Selected({ root, answer }: { root: { current: HTMLElement | null }; answer: Turn }) {
  const [words_, setWords] = useState<Marked | null>(null);
  const say_ = words();
  useEffect(() => {
    const look = (): void => {
      const chosen = document.getSelection();
      const box = root.current;
      if (!chosen || chosen.isCollapsed || chosen.rangeCount === 0 || !box) {
        setWords(null);
        return;
      }
      const range = chosen.getRangeAt(0);
      const from = offsetIn(box, range.startContainer, range.startOffset);
      const to = offsetIn(box, range.endContainer, range.endOffset);
      setWords(from === null || to === null ? null : marked(answer.text, from, to));
    };
    document.addEventListener("selectionchange", look);
    return () => document.removeEventListener("selectionchange", look);
  }, [root, answer]);
  if (words_ === null) return null;
  const mark = (value: 1 | -1): void => {
    void say(answer, { kind: "span", value, span: words_ });
    document.getSelection()?.removeAllRanges();
    setWords(null);
  };
  const short = words_.text.length > 24 ? `${words_.text.slice(0, 23)}…` : words_.text;
  return (
    <div class="selected" role="toolbar" aria-label={fill(say_.mark, { text: short })}>
      <span>{fill(say_.mark, { text: short })}</span>
      {([1, -1] as const).map((value) => (
        <button key={value} type="button" onPointerDown={(event) => event.preventDefault()} onClick={() => mark(value)}>
          {value === 1 ? say_.markGood : say_.markBad}
        </button>
      ))}
    </div>
  );
}

function Clicks({ answer }: { answer: Turn }) {
  const say_ = words();
  const takenBack = new Set(answer.clicks.filter((c) => c.kind === "retract").map((c) => c.story?.value));
  return (
    <ul class="clicks" aria-live="polite">
      {answer.clicks.map((click) => (
        <li key={click.id} class={click.story?.state ?? "pending"}>
          <span class="kind">{say_.kind[click.kind]}</span>{" "}
          <span>{click.story === null ? say_.pending : told(click.story)}</span>
          {click.kind !== "retract" && !takenBack.has(click.id) && (
            <button
              type="button"
              class="tool small"
              title={say_.undo}
              aria-label={say_.undo}
              onClick={() => {
                answer.rated = null;
                void say(answer, { kind: "retract", value: click.id });
              }}
            >
              <Icon name="undo" />
            </button>
          )}
        </li>
      ))}
    </ul>
  );
}
