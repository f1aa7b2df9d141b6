// Markdown with code and maths, as safe HTML. Nothing is loaded from elsewhere: pictures become links.
import DOMPurify from 'dompurify';
import hljs from 'highlight.js/lib/core';
import bash from 'highlight.js/lib/languages/bash';
import cpp from 'highlight.js/lib/languages/cpp';
import css from 'highlight.js/lib/languages/css';
import diff from 'highlight.js/lib/languages/diff';
import go from 'highlight.js/lib/languages/go';
import java from 'highlight.js/lib/languages/java';
import javascript from 'highlight.js/lib/languages/javascript';
import json from 'highlight.js/lib/languages/json';
import markdown from 'highlight.js/lib/languages/markdown';
import python from 'highlight.js/lib/languages/python';
import rust from 'highlight.js/lib/languages/rust';
import sql from 'highlight.js/lib/languages/sql';
import typescript from 'highlight.js/lib/languages/typescript';
import xml from 'highlight.js/lib/languages/xml';
import yaml from 'highlight.js/lib/languages/yaml';
import { Marked } from 'marked';
import temml from 'temml/dist/temml.mjs';

const languages = {
  bash,
  cpp,
  css,
  diff,
  go,
  java,
  javascript,
  json,
  markdown,
  python,
  rust,
  sql,
  typescript,
  xml,
  yaml,
};
for (const [name, grammar] of Object.entries(languages)) hljs.registerLanguage(name, grammar);

const escape = text => text.replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);

function math(text, displayMode) {
  return temml.renderToString(text, { displayMode, throwOnError: false, trust: false });
}

const blockMath = {
  name: 'blockMath',
  level: 'block',
  start: src => src.match(/\$\$|\\\[/)?.index,
  tokenizer(src) {
    const found = /^\$\$([\s\S]+?)\$\$(?:\n|$)/.exec(src) ?? /^\\\[([\s\S]+?)\\\](?:\n|$)/.exec(src);
    if (found) return { type: 'blockMath', raw: found[0], text: found[1].trim() };
  },
  renderer: token => `<p class="math">${math(token.text, true)}</p>`,
};
const inlineMath = {
  name: 'inlineMath',
  level: 'inline',
  start: src => src.match(/\$|\\\(/)?.index,
  tokenizer(src) {
    // A price is no formula: no space inside the dollars, no digit after them.
    const found =
      /^\$\$([^$]+?)\$\$/.exec(src) ??
      /^\$(?!\s)((?:\\\$|[^$\n])+?)(?<!\s)\$(?!\d)/.exec(src) ??
      /^\\\(([\s\S]+?)\\\)/.exec(src);
    if (found) return { type: 'inlineMath', raw: found[0], text: found[1] };
  },
  renderer: token => math(token.text, false),
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  extensions: [blockMath, inlineMath],
  renderer: {
    code({ text, lang }) {
      const name = (lang ?? '').trim().split(/\s/)[0].toLowerCase();
      const known = hljs.getLanguage(name);
      const body = known ? hljs.highlight(text, { language: name, ignoreIllegals: true }).value : escape(text);
      const button = '<button type="button" class="copy" data-copy>Copy</button>';
      const head = `<div class="code-head"><span>${escape(name || 'text')}</span>${button}</div>`;
      return `<div class="code">${head}<pre><code>${body}</code></pre></div>`;
    },
    image({ href, text }) {
      return `<a href="${escape(href)}" target="_blank" rel="noopener noreferrer">${escape(text || href)}</a>`;
    },
    html({ text }) {
      return escape(text);
    },
  },
});

DOMPurify.addHook('afterSanitizeAttributes', node => {
  if (node.tagName === 'A') {
    node.setAttribute('target', '_blank');
    node.setAttribute('rel', 'noopener noreferrer');
  }
});

export function render(text) {
  return DOMPurify.sanitize(marked.parse(text), {
    ADD_ATTR: ['target', 'data-copy'],
    FORBID_TAGS: ['img', 'style', 'form', 'input', 'iframe', 'video', 'audio', 'source'],
  });
}
