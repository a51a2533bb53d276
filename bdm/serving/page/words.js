// Labels in both languages, and putting them on the page.

const WORDS = {
  skip: ["Skip to the form", "跳到表单"],
  title: ["draw in two languages", "双语绘图"],
  form: ["What to draw", "绘制内容"],
  prompts: ["Prompts", "提示词"],
  oneBox: ["One box for both languages", "两种语言写在一个框里"],
  box: ["Prompt in both languages", "双语提示词"],
  boxHelp: [
    "Parts between commas go to the side of their script; what came of it stands below and can be edited.",
    "逗号之间的部分按文字归入两侧；结果显示在下面，可以修改。",
  ],
  splitEdited: ["Edited by hand; typing in the one box splits anew.", "已手动修改；在上面的框中输入会重新拆分。"],
  native: ["Chinese (the branch)", "中文（支路）"],
  english: ["English (the backbone)", "英文（主干）"],
  negatives: ["Negative prompts", "反向提示词"],
  negativeNative: ["Negative, Chinese", "反向，中文"],
  negativeEnglish: ["Negative, English", "反向，英文"],
  languages: ["Between the languages", "两种语言之间"],
  branchScale: ["Branch scale", "支路强度"],
  world: ["World: 中 → EN", "世界：中 → 英"],
  useWorld: ["Use the world slider (needs an English prompt)", "使用世界滑块（需要英文提示词）"],
  settings: ["Settings", "设置"],
  width: ["Width", "宽"],
  height: ["Height", "高"],
  steps: ["Steps", "步数"],
  guidance: ["Guidance", "引导强度"],
  sampler: ["Sampler", "采样器"],
  schedule: ["Schedule", "调度"],
  ownSampler: ["The model's own", "模型自带"],
  seed: ["Seed", "种子"],
  count: ["Pictures", "张数"],
  anySeed: ["A new seed each time", "每次使用新种子"],
  start: ["Picture to start from, mask, ControlNet", "起始图、蒙版、ControlNet"],
  choosePicture: ["Choose a picture", "选择图片"],
  clearPicture: ["Without picture", "去掉图片"],
  clearMask: ["Without mask", "清除蒙版"],
  maskHelp: [
    "Paint where it is drawn anew; without a mask all of it is. Keys: arrows move, space paints.",
    "涂抹需要重画的部分；没有蒙版则全部重画。键盘：方向键移动，空格涂抹。",
  ],
  canvas: ["Picture to start from; paint the mask here", "起始图；在此涂抹蒙版"],
  brush: ["Brush", "画笔"],
  strength: ["Drawn anew", "重画程度"],
  control: ["Use it as", "用作"],
  startPicture: ["the picture to start from", "起始图"],
  controlWith: ["condition of", "条件图："],
  canny: ["Find its edges first (canny)", "先提取边缘（canny）"],
  plugins: ["Plug-ins", "插件"],
  noPlugins: [
    "None: start the server with --models and a folder of files.",
    "没有文件：启动服务器时用 --models 指定文件夹。",
  ],
  somePlugins: ["Trigger words act through the English prompt; press one to add it.", "触发词作用于英文提示词；点按即可加入。"],
  useIt: ["Use", "使用"],
  inUse: ["In use", "已使用"],
  pluginStrength: ["strength", "强度"],
  draw: ["Draw", "绘制"],
  cancel: ["Cancel", "取消"],
  restore: ["Settings of a picture …", "读取图片中的设置…"],
  stage: ["Being drawn", "正在绘制"],
  gallery: ["Gallery", "图库"],
  more: ["Older pictures", "更早的图片"],
  drop: ["Drop a picture: its settings are restored", "放下图片：恢复其设置"],
  detail: ["Picture and settings", "图片与设置"],
  use: ["Use these settings", "使用这些设置"],
  save: ["Save picture", "保存图片"],
  remove: ["Delete", "删除"],
  close: ["Close", "关闭"],
  key: ["API key", "API 密钥"],
  keyHelp: ["This server asks for its key.", "此服务器需要密钥。"],
  enter: ["Go on", "继续"],
  queued: ["waits", "等待中"],
  running: ["step", "步"],
  done: ["Drawn.", "完成。"],
  cancelled: ["Cancelled.", "已取消。"],
  returned: ["The server stopped before it was drawn.", "服务器在绘制前停止。"],
  failed: ["Not drawn:", "未能绘制："],
  restored: ["Settings of the picture are restored.", "已恢复图片的设置。"],
  missing: ["Not here:", "此处没有："],
  keeps: ["Kept from the picture beside the form:", "沿用图片的其他设置："],
  forget: ["Forget them", "清除"],
  lost: ["pictures were lost when the server was ended", "张图片因服务器中断而丢失"],
  unreachable: ["The server cannot be reached.", "无法连接服务器。"],
  picture: ["Picture", "图片"],
  preview: ["Preview", "预览"],
  model: ["Model", "模型"],
  mode: ["Drawn from", "起始方式"],
  englishGuidance: ["English guidance", "英文引导强度"],
  enlarge: ["Enlarged", "放大倍数"],
  clipSkip: ["CLIP layer", "CLIP 层"],
  rules: ["Read by", "提示词规则"],
  branchStart: ["Branch from", "支路起点"],
  branchEnd: ["Branch to", "支路终点"],
  beside: ["Further branch", "另一支路"],
  branchSchedule: ["Branch schedule", "支路调度"],
  approximation: ["Left out", "近似"],
  precision: ["Precision", "精度"],
  versions: ["Drawn with", "版本"],
};

let place = 0;

export function word(name) {
  return WORDS[name] ? WORDS[name][place] : name;
}

export function language() {
  return place ? "zh" : "en";
}

export function setLanguage(name) {
  place = name === "zh" ? 1 : 0;
  localStorage.setItem("bdm-language", language());
  document.documentElement.lang = place ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-word]")) {
    element.textContent = word(element.dataset.word);
  }
}

export function usualLanguage() {
  const kept = localStorage.getItem("bdm-language");
  return kept || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
}
