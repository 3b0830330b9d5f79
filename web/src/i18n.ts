/** The page's words in English and Chinese. */

import { signal } from "./state";

const en = {
  chat: "Chat",
  watch: "Watch",
  language: "中文",
  placeholder: "Say something…",
  send: "Send",
  stop: "Stop",
  fresh: "New chat",
  welcome: "Talk to the model, then tell it what was good. It learns from every click within seconds.",
  good: "Good answer",
  bad: "Bad answer",
  score: "{n} of 5",
  rate: "Rate",
  edit: "Edit",
  editing: "Your version of this answer",
  save: "Teach this version",
  cancel: "Cancel",
  again: "Try again",
  better: "This one is better",
  keep: "Choose the better answer, or go on without choosing.",
  mark: "Mark “{text}”",
  markGood: "Good words",
  markBad: "Bad words",
  undo: "Take back",
  pending: "Recorded. Waiting to be learned…",
  learned: "Learned in {seconds} s, version {version}",
  learnedUnserved: "Learned, version {version} is about to serve",
  moved: "log-probability of {what}: {before} → {after}",
  joined: "{when}; {moved}",
  whatText: "this answer",
  whatEdit: "your version",
  whatSpan: "the marked words",
  unused: "Not used: {reason}",
  superseded: "Replaced by a later rating{reason}",
  kind: {
    score: "score",
    thumb: "thumb",
    edit: "edit",
    comparison: "comparison",
    span: "marked words",
    comment: "comment",
    retract: "take back",
  },
  state: { pending: "waiting", used: "learned", superseded: "replaced", unused: "not used" },
  versionOf: "version {n}",
  model: "{model}, version {version}",
  learner: "learner: {state}",
  reward: "Reward over time",
  rewardNone: "No thumb or score yet.",
  rewardLine: "mean of the last {n}",
  rewardEach: "each rating",
  versions: "Versions",
  lineage: "from {parent}",
  first: "the first",
  serving: "serves",
  anchor: "anchor",
  roll: "Roll back",
  promote: "Let it serve",
  passed: "passed the slow gate",
  failed: "failed the slow gate",
  gone: "weights no longer kept",
  published: "published",
  refused: "refused by the gate",
  nothing: "nothing to learn",
  latency: "From click to serving",
  latencyNone: "Nothing learned yet.",
  latencyOf: "median of the last {n} that were learned: {seconds} s",
  stages: { queued: "queued", begun: "read", stepped: "step", gated: "gate", served: "publish and load" },
  log: "Feedback",
  logNone: "No feedback with these filters.",
  allKinds: "all kinds",
  allStates: "all states",
  allSources: "all sources",
  what: "What it did",
  needKey: "This server asks for an API key.",
  key: "API key",
  enter: "Enter",
  offline: "The server does not answer. Retrying…",
  events: "events: {n}",
};

type Words = typeof en;

const zh: Words = {
  chat: "对话",
  watch: "观察",
  language: "English",
  placeholder: "说点什么…",
  send: "发送",
  stop: "停止",
  fresh: "新对话",
  welcome: "和模型聊聊，再告诉它哪里好。每次点击，它几秒内就会学到。",
  good: "好回答",
  bad: "差回答",
  score: "{n} / 5 分",
  rate: "评分",
  edit: "修改",
  editing: "你改写的回答",
  save: "教它这样说",
  cancel: "取消",
  again: "再来一个",
  better: "这个更好",
  keep: "选出更好的回答，或不选继续。",
  mark: "标记“{text}”",
  markGood: "说得好",
  markBad: "说得不好",
  undo: "撤回",
  pending: "已记录，等待学习…",
  learned: "{seconds} 秒内学会，版本 {version}",
  learnedUnserved: "已学会，版本 {version} 即将上线",
  moved: "{what}的对数概率：{before} → {after}",
  joined: "{when}；{moved}",
  whatText: "此回答",
  whatEdit: "你的版本",
  whatSpan: "标记的词",
  unused: "未采用：{reason}",
  superseded: "已被之后的评价取代{reason}",
  kind: {
    score: "评分",
    thumb: "拇指",
    edit: "修改",
    comparison: "比较",
    span: "标记词",
    comment: "评论",
    retract: "撤回",
  },
  state: { pending: "等待", used: "已学", superseded: "被取代", unused: "未采用" },
  versionOf: "版本 {n}",
  model: "{model}，版本 {version}",
  learner: "学习进程：{state}",
  reward: "奖励随时间",
  rewardNone: "还没有拇指或评分。",
  rewardLine: "最近 {n} 次的平均",
  rewardEach: "每次评价",
  versions: "版本",
  lineage: "源自 {parent}",
  first: "最初",
  serving: "服务中",
  anchor: "锚点",
  roll: "回退",
  promote: "启用",
  passed: "通过慢速检验",
  failed: "未通过慢速检验",
  gone: "权重已清理",
  published: "已发布",
  refused: "被检验拒绝",
  nothing: "无可学",
  latency: "从点击到上线",
  latencyNone: "还没有学到什么。",
  latencyOf: "最近 {n} 次学习的中位数：{seconds} 秒",
  stages: { queued: "排队", begun: "读取", stepped: "更新", gated: "检验", served: "发布与加载" },
  log: "反馈",
  logNone: "没有符合条件的反馈。",
  allKinds: "所有类型",
  allStates: "所有状态",
  allSources: "所有来源",
  what: "它做了什么",
  needKey: "此服务器需要 API 密钥。",
  key: "API 密钥",
  enter: "进入",
  offline: "服务器没有应答，正在重试…",
  events: "事件：{n}",
};

export type Language = "en" | "zh";
const TABLE: Record<Language, Words> = { en, zh };
const KEPT = "operant.language";

function begin(): Language {
  const kept = localStorage.getItem(KEPT);
  if (kept === "en" || kept === "zh") return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

export const language = signal<Language>(begin());

export function switchLanguage(): void {
  language.set(language.get() === "en" ? "zh" : "en");
  localStorage.setItem(KEPT, language.get());
  document.documentElement.lang = language.get();
}

export function words(): Words {
  return TABLE[language.get()];
}

/** A text with its {names} filled in. */
export function fill(text: string, values: Record<string, string | number>): string {
  return text.replace(/\{(\w+)\}/g, (whole, name: string) => (name in values ? String(values[name]) : whole));
}
