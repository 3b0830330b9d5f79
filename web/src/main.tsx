import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import * as api from "./api";
import { Chat } from "./chat";
import { fill, language, switchLanguage, words } from "./i18n";
import { served, useSignal } from "./state";
import "./style.css";
import { Watch } from "./watch";

const LOOK_EVERY = 3000;

function App() {
  useSignal(language);
  const [view, setView] = useState(location.hash === "#watch" ? "watch" : "chat");
  const [health, setHealth] = useState<api.Health | null>(null);
  const [locked, setLocked] = useState(false);
  const [entered, enter] = useState(0);
  const say = words();
  // a new key is tried at once
  useEffect(() => {
    api.versions().then(
      () => setLocked(false),
      (error) => setLocked(error instanceof api.Refused && error.status === 401),
    );
  }, [entered]);
  useEffect(() => {
    const look = (): void => void api.health().then(setHealth, () => setHealth(null));
    look();
    const timer = window.setInterval(look, LOOK_EVERY);
    const follow = (): void => setView(location.hash === "#watch" ? "watch" : "chat");
    window.addEventListener("hashchange", follow);
    const deaf = served.listen(look);
    return () => {
      deaf();
      window.clearInterval(timer);
      window.removeEventListener("hashchange", follow);
    };
  }, []);
  return (
    <>
      <header>
        <nav>
          {(["chat", "watch"] as const).map((name) => (
            <a key={name} href={`#${name}`} aria-current={view === name ? "page" : undefined}>
              {say[name]}
            </a>
          ))}
        </nav>
        <span class="health" aria-live="polite">
          {health === null
            ? say.offline
            : `${fill(say.model, { model: health.model, version: health.version })} · ${fill(say.learner, { state: say.learnerIs[health.learner] ?? health.learner })}`}
        </span>
        <button type="button" class="quiet" onClick={switchLanguage}>
          {say.language}
        </button>
      </header>
      {locked ? <Lock onEnter={() => enter((n) => n + 1)} /> : view === "chat" ? <Chat /> : <Watch />}
    </>
  );
}

function Lock({ onEnter }: { onEnter: () => void }) {
  const say = words();
  const [value, setValue] = useState("");
  return (
    <main class="lock">
      <form
        onSubmit={(event) => {
          event.preventDefault();
          api.useKey(value);
          onEnter();
        }}
      >
        <p>{say.needKey}</p>
        <input
          type="password"
          autocomplete="off"
          aria-label={say.key}
          value={value}
          onInput={(event) => setValue(event.currentTarget.value)}
        />
        <button type="submit" class="main">
          {say.enter}
        </button>
      </form>
    </main>
  );
}

document.documentElement.lang = language.get();
render(<App />, document.getElementById("app") as HTMLElement);
