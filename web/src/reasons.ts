/** Why something was not used or refused, in the page's language. The server tells it in English. */

import { language } from "./i18n";

/** The server's sentences, {…} where it fills something in, and the same in Chinese. `tests/test_page.py` finds in the
 * server which of them are missing. */
const CHINESE: readonly [string, string][] = [
  ["retracted", "已被撤回"],
  ["a later one stands", "以之后的为准"],
  ["comment teaches nothing", "评论不改变模型"],
  ["completion unknown", "没有这条回答的记录"],
  ["tokens missing", "这条回答没有留下词元"],
  ["completion of another tokenizer", "回答来自另一个分词器"],
  ["log-probs missing", "没有回答的对数概率"],
  ["longer than the model holds", "超出模型的长度"],
  ["span value outside -1 to 1", "标注的值不在 −1 到 1 之间"],
  ["the span marks no token that the policy wrote", "标注处没有模型写的词元"],
  ["no token that the policy wrote", "其中没有模型写的词元"],
  ["span without characters", "标注里没有文字"],
  ["span outside the text", "标注超出了文本"],
  ["score outside {low} to {high}", "评分不在 {low} 到 {high} 之间"],
  ["thumb is neither up nor down", "既不是赞也不是踩"],
  ["the other completion is unknown", "没有另一条回答的记录"],
  ["tokens of the other completion missing", "另一条回答没有留下词元"],
  ["edits that are empty", "修改后是空的"],
  ["edits that change nothing", "修改前后相同"],
  ["comparisons across prompts", "两条回答对应的问题不同"],
  ["pairs of the same text", "两条回答相同"],
  ["completions with tokens that the policy did not write", "回答里有不是模型写的词元"],
  ["advantage 0: the rating equals the baseline", "优势为 0：评价与基线相同"],
  ["greedy completion has no propensity", "贪心生成的回答没有可用的概率"],
  [
    "what this source says of answers contradicts what others say of them; it counts again when they agree",
    "这个来源的评价与其他人的相反；意见一致后会重新计入",
  ],
  [
    "over the cap: this source has had its share of what was learned lately, and others have to speak first; --influence_cap sets the share",
    "超过上限：这个来源近来的份额已经用完，要等其他人先评价；份额由 --influence_cap 设定",
  ],
  [
    "weighed {weight}: its source is contradicted by others, or has nearly had its share of what was learned lately",
    "按 {weight} 计入：它的来源与其他人意见相反，或近来的份额将尽",
  ],
  ["the policy has moved too far from this text to push it down", "模型离这段文字已经太远，不能再压低它"],
  ["no step within the KL budget moved the text the right way", "在 KL 预算之内没有哪一步能让它朝对的方向变"],
  [
    "taken back after version {versions} had learned from it; roll back to before that to forget it",
    "在版本 {versions} 学过之后才撤回；要忘掉它，请回滚到那之前",
  ],
  ["takes back {events}", "撤回 {events}"],
  ["there is nothing to take back", "没有可以撤回的"],
  ["forgotten: its source has taken everything back", "已忘记：它的来源撤回了一切"],
  ["its step says nothing of it", "它所在的一步没有提到它"],
  ["the step failed: {error}", "这一步失败了：{error}"],
  ["the gate refused the version: {reason}", "闸门拒绝了这个版本：{reason}"],
  ["the KL to the parent is {value}, over {limit}", "到上一版本的 KL 是 {value}，超过 {limit}"],
  [
    "the KL to the version that drift is measured from is {value}, over {limit}",
    "累积漂移的 KL 是 {value}，超过 {limit}",
  ],
  [
    "the likelihood that the anchor answers lost is {value}, over {limit}",
    "锚定回答的对数似然降低了 {value}，超过 {limit}",
  ],
  [
    "answers repeat themselves: the share of pairs of tokens that come again is {value}, where the anchor version's is {anchor}",
    "回答重复自己：再次出现的词元对占 {value}，锚定版本是 {anchor}",
  ],
  [
    "answers are empty: their share is {value}, where the anchor version's is {anchor}",
    "空回答占 {value}，锚定版本是 {anchor}",
  ],
  [
    "answers are nearly nothing: their length in tokens is {value}, where the anchor version's is {anchor}",
    "回答几乎没有内容：长度为 {value} 个词元，锚定版本是 {anchor}",
  ],
  [
    "different questions get one answer: its share is {value}, where the anchor version's is {anchor}",
    "不同的问题得到同一个回答：占 {value}，锚定版本是 {anchor}",
  ],
  ["{metric} is {value}, under {floor}", "{metric} 是 {value}，低于 {floor}"],
  ["a learner, and none runs here", "这里没有学习进程"],
  ["the end of its answer", "等这条回答写完"],
  ["the learner, which failed and tries again: {fault}", "学习进程出错，正在重试：{fault}"],
  ["the learner, which is starting", "学习进程正在启动"],
  ["a source that is being forgotten", "正在忘记某个来源"],
  ["its step, which is being made", "正在学习"],
  ["the step before its own", "等前一步学完"],
  ["ratings of {count} sources", "等 {count} 个来源的评价"],
  ["its turn", "排队中"],
];

const PATTERNS = CHINESE.map(([english, chinese]) => [pattern(english), chinese] as const);

/** A reason as the reader reads it; one without a translation stays as it came. Several are parted by "; ". */
export function reasonOf(told: string): string {
  if (language.get() === "en" || told === "") return told;
  return (
    whole(told) ??
    told
      .split("; ")
      .map((part) => whole(part) ?? part)
      .join("；")
  );
}

function whole(told: string): string | null {
  for (const [matches, chinese] of PATTERNS) {
    const found = matches.exec(told);
    if (found) return chinese.replace(/\{(\w+)\}/g, (_, name: string) => reasonOf(found.groups?.[name] ?? ""));
  }
  return null;
}

/** What a sentence matches whole. What is filled in has no "; ", so that two sentences are not read as one. */
function pattern(english: string): RegExp {
  const escaped = english.replace(/[.*+?^$()|[\]\\]/g, "\\$&").replace(/\{(\w+)\}/g, "(?<$1>(?:(?!; ).)+)");
  return new RegExp(`^${escaped}$`, "s");
}
