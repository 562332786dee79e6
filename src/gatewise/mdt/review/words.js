// What the page says, in English, which stands in the code itself, and in Chinese.

const KEY = "gatewise-review-language";
const CHINESE = {
  "Review of decision trees": "诊疗决策树审核",
  "Needs review by a clinician. Not medical advice.": "须经临床医生审核，不构成医疗建议。",
  "Add text…": "添加文本…",
  "Extract all": "全部提取",
  "Export…": "导出…",
  "Save": "保存",
  "Save ({count})": "保存（{count}）",
  "Ctrl+S: writes {path}": "Ctrl+S：写入 {path}",
  "Cancel": "取消",
  "Extraction": "提取",
  "Passages and text": "段落与原文",
  "Passages": "段落",
  "Population": "适用人群",
  "Passage": "原文",
  "Tree": "决策树",
  "Node": "节点",
  "Language of the page": "界面语言",
  "Select words in the text to use them as a subject or an object.": "在原文中选取词语，用作主体或客体。",
  "Add as triple": "添加为三元组",
  "Nothing to review yet": "暂无可审核的内容",
  "Add a text or a file with “Add text…”. A long text is cut into passages.": "请用“添加文本…”添加文本或文件。长文本会被切分为段落。",
  "Previous passage": "上一段",
  "Next passage": "下一段",
  "Undo": "撤销",
  "Redo": "重做",
  "Whole tree": "整棵树",
  "Shrink the tree until all of it is seen": "缩小至可看到整棵树",
  "Extract": "提取",
  "Extract again": "重新提取",
  "Remove": "移除",
  "Approve": "批准",
  "Approved ✓": "已批准 ✓",
  "Add a text": "添加文本",
  "Text": "文本",
  "or a file: a text (.txt, .md, .pdf, .docx) or trees (.json, .jsonl)": "或文件：文本（.txt、.md、.pdf、.docx）或决策树（.json、.jsonl）",
  "Whom the text is about, if it does not say": "适用人群（若文中未写明）",
  "Close": "关闭",
  "Add": "添加",
  "Export": "导出",
  "Trees": "决策树",
  "of this passage": "本段",
  "that are approved": "已批准的",
  "of all passages": "全部段落",
  "Format": "格式",
  "Download": "下载",
  "no tree": "无树",
  "to review": "待审核",
  "corrected": "已修改",
  "approved": "已批准",
  "unfinished": "未完成",
  "failed": "失败",
  "waiting": "等待中",
  "writing…": "生成中…",
  "not saved": "未保存",
  "Your edits are not kept on disk: {why}": "修改未能保存到磁盘：{why}",
  "Stopping": "正在停止",
  "Waiting for the model": "等待模型",
  "Writing the tree of passage {number}, {seconds} s": "正在生成第 {number} 段的决策树，{seconds} 秒",
  "Writing the tree of passage {number}, {tokens} of at most {most} tokens, {seconds} s":
    "正在生成第 {number} 段的决策树，已写 {tokens} 个词元（至多 {most}），{seconds} 秒",
  "{at} of {of}": "{at} / {of}",
  "All passages without a tree": "所有尚无决策树的段落",
  "{done} of {count} approved": "已批准 {done} / {count}",
  "node {numbers}": "节点 {numbers}",
  "Selected: “{phrase}”": "已选取：“{phrase}”",
  "Passage {number}": "第 {number} 段",
  "Warnings of the extraction: the tree may be incomplete": "提取过程有警告，决策树可能不完整",
  "Not a valid tree yet: ": "还不是有效的决策树：",
  "A valid tree, but some phrases are not in the text: ": "决策树有效，但有词语不在原文中：",
  "A valid tree; every phrase is in the text.": "决策树有效，所有词语均在原文中。",
  "The tree is being written.": "正在生成决策树。",
  "This passage has no tree yet.": "本段尚无决策树。",
  "Begin with an empty tree": "从空树开始",
  "Saved: {path}, trees: {count}": "已保存：{path}，决策树 {count} 棵",
  "Nothing is corrected or approved yet, so {path} has no trees": "尚无已修改或已批准的决策树，{path} 中没有内容",
  "; not yet in it, because unfinished: passage {numbers}": "；未完成而未写入：第 {numbers} 段",
  "Cancelled; trees that are done stay.": "已取消；已完成的决策树保留。",
  "Take passage {number} out of the review?": "将第 {number} 段移出审核？",
  "Passages added: {count}.": "已添加段落：{count}。",
  "The review has ended, or cannot be reached. Start it again; everything is kept.": "审核已结束或无法连接。请重新启动；所有内容均已保留。",
  "The file could not be read.": "无法读取该文件。",
  "Node {number}": "节点 {number}",
  "the root": "根节点",
  "if yes to node {number}": "节点 {number} 为“是”时",
  "if no to node {number}": "节点 {number} 为“否”时",
  "Kind": "类型",
  "Condition": "条件",
  "Decision": "决策",
  "Triples joined by": "三元组之间的关系",
  "all of these (and)": "同时满足（且）",
  "any of these (or)": "满足任一（或）",
  "do all (and)": "全部采用（且）",
  "do any (or)": "任选其一（或）",
  "Triple {number}": "三元组 {number}",
  "Subject": "主体",
  "Relation": "关系",
  "Object": "客体",
  "Add triple": "添加三元组",
  "Delete triple": "删除三元组",
  "Delete triple {number}": "删除三元组 {number}",
  "From text": "取自原文",
  "Take the words selected in the text": "采用原文中选取的词语",
  "{part}: take the words selected in the text": "{part}：采用原文中选取的词语",
  "! not in the text": "! 原文中未找到",
  "! in the text only as part of “{whole}”": "! 在原文中只作为“{whole}”的一部分出现",
  "Change the tree here": "在此处修改树的结构",
  "Swap the yes and no branches": "交换“是”“否”分支",
  "Drop this condition, keep its yes branch": "去掉此条件，保留“是”分支",
  "Drop this condition, keep its no branch": "去掉此条件，保留“否”分支",
  "Put a condition above, this on its yes side": "在上方加条件，本节点在“是”侧",
  "Put a condition above, this on its no side": "在上方加条件，本节点在“否”侧",
  "Delete this node and all below it": "删除此节点及其下所有节点",
  "Empty this leaf": "清空此叶节点",
  "Look at the present tree": "查看当前的树",
  "Make my change on it": "在其上进行我的修改",
  "Drop my change": "放弃我的修改",
  "Passage {number} was changed while you were at work on it: {what}.": "您处理第 {number} 段时，该段已被修改：{what}。",
  "Not done yet, and kept here: {what}.": "尚未进行，保留于此：{what}。",
  "What it was about is no longer in the tree": "所涉及的内容已不在树中",
  "changed the tree": "修改了树",
  "began a tree": "新建了树",
  "took a change back": "撤销了修改",
  "made a change again": "重做了修改",
  "approved it": "批准了该树",
  "took the approval back": "撤回了批准",
  "had it extracted": "进行了提取",
  "took an extraction": "采用了提取结果",
  "changed it": "修改了该段",
  "a new triple": "新的三元组",
  "deleting a triple": "删除三元组",
  "a change of the tree": "对树的修改",
  "the approval": "批准",
  "The approved tree stays in the file of corrections until this one is approved.": "在批准此树之前，修改文件中保留已批准的树。",
  "A new extraction lies beside this tree": "此树旁有新的提取结果",
  "Take it in place of the tree": "用它代替此树",
  "Leave it": "不采用",
  "Put the extraction in the place of a tree that a person corrected or approved?": "用提取结果代替已由人修改或批准的树？",
  "The extraction will lie beside your tree.": "提取结果将置于您的树旁。",
  "; as it was approved before, until you approve it again: passage {numbers}": "；保留此前批准的树，直至再次批准：第 {numbers} 段",
};

export const language = localStorage.getItem(KEY) || (navigator.language.startsWith("zh") ? "zh" : "en");

export function choose(name) {
  localStorage.setItem(KEY, name);
  location.reload();
}

// The words in the language of the page, with {names} replaced.
export function tr(english, values = {}) {
  const words = (language === "zh" && CHINESE[english]) || english;
  return words.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? values[name] : whole));
}

// What stands in page.html itself.
export function translatePage() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  if (language !== "zh") return;
  document.title = tr(document.title);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const said = walk.currentNode.data.trim();
    if (said in CHINESE) walk.currentNode.data = walk.currentNode.data.replace(said, CHINESE[said]);
  }
  for (const name of ["aria-label", "title"]) {
    for (const one of document.querySelectorAll(`[${name}]`)) one.setAttribute(name, tr(one.getAttribute(name)));
  }
}
