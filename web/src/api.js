// The server, as this page uses it.
import { preference } from './store.js';

export class Unauthorised extends Error {}

async function call(path, body, signal) {
  const headers = { 'content-type': 'application/json' };
  const key = preference('key', '');
  if (key) headers.authorization = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(
      path,
      body === undefined ? { headers, signal } : { method: 'POST', headers, body: JSON.stringify(body), signal },
    );
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Error('The server cannot be reached.');
  }
  if (answer.status === 401) throw new Unauthorised('This server needs an API key.');
  if (!answer.ok) {
    let message = `The server answered ${answer.status}.`;
    try {
      message = (await answer.json()).error.message;
    } catch {}
    throw new Error(message);
  }
  return answer;
}

export const models = async () => (await (await call('/v1/models')).json()).data;
export const vote = async body => (await call('/votes', body)).json();

const shown = ['temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'max_tokens', 'seed'];
export const BASE_TOKENS = 256; // that a text without an end goes on for, at a time

function sampling(model, settings) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true } };
  for (const name of shown)
    if (settings[name] !== undefined && settings[name] !== null && settings[name] !== '')
      body[name] = Number(settings[name]);
  return body;
}

// The continuation of a text, streamed.
export function complete({ model, prompt, settings, probabilities, signal, update }) {
  const body = { max_tokens: BASE_TOKENS, ...sampling(model, settings), prompt };
  if (probabilities) body.logprobs = 5;
  return stream('/v1/completions', body, signal, update);
}

// One answer, streamed. `goOn`: the last message is an answer that was cut off, and is gone on with.
export function answer({ model, messages, settings, probabilities, signal, update, goOn = false }) {
  if (model.pretrained_only || !model.chat) {
    const prompt = messages
      .filter(m => m.role !== 'system')
      .map(m => m.content)
      .join('');
    return complete({ model, prompt, settings, probabilities, signal, update });
  }
  const body = sampling(model, settings);
  body.messages = settings.system ? [{ role: 'system', content: settings.system }, ...messages] : messages;
  if (goOn) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  if (probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (settings.tools) body.tools = JSON.parse(settings.tools);
  if (model.thinks && settings.thinking === 'off') body.reasoning_effort = 'none';
  if (model.thinks && settings.thinking && settings.thinking !== 'off') body.reasoning_effort = settings.thinking;
  if (settings.schema)
    body.response_format = {
      type: 'json_schema',
      json_schema: { name: 'answer', schema: JSON.parse(settings.schema) },
    };
  return stream('/v1/chat/completions', body, signal, update);
}

// `update` is called with the answer so far whenever something came.
async function stream(path, body, signal, update) {
  const plain = path === '/v1/completions';
  const out = { content: '', reasoning: '', calls: [], tokens: [], finish: null, meter: null };
  const began = performance.now();
  let first = null;
  let usage = null;
  let pieces = 0;
  const meter = () => {
    const end = performance.now();
    const tokens = usage?.completion_tokens ?? (out.tokens.length || pieces);
    return {
      first: first === null ? null : (first - began) / 1000,
      rate: tokens && first !== null && end > first ? (tokens - 1) / ((end - first) / 1000) : null,
      tokens,
      prompt: usage?.prompt_tokens ?? null,
      cached: usage?.prompt_tokens_details?.cached_tokens ?? null,
      reasoning: usage?.completion_tokens_details?.reasoning_tokens ?? null,
      seconds: (end - began) / 1000,
    };
  };
  const reader = (await call(path, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      rest += value;
      const events = rest.split('\n\n');
      rest = events.pop();
      for (const event of events) {
        const data = event.startsWith('data: ') ? event.slice(6) : '';
        if (!data || data === '[DONE]') continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Broken(chunk.error.message);
        usage = chunk.usage ?? usage;
        const choice = chunk.choices[0];
        if (!choice) continue;
        pieces += 1;
        if (plain) take(out, { content: choice.text }, oldForm(choice.logprobs));
        else take(out, choice.delta, choice.logprobs?.content);
        if (first === null && (out.content || out.reasoning || out.calls.length)) first = performance.now();
        out.finish = choice.finish_reason ?? out.finish;
      }
      out.meter = meter();
      update(out);
    }
  } catch (error) {
    if (error.name === 'AbortError' || error instanceof Broken) throw error;
    throw new Error('The connection to the server broke. What had come is kept.');
  } finally {
    out.meter = meter();
  }
  if (out.finish === null) throw new Error('The server ended the answer before it was complete. What had come is kept.');
  return out;
}

class Broken extends Error {} // by what the server says

function oldForm(scores) {
  return scores?.tokens.map((token, i) => ({
    token,
    logprob: scores.token_logprobs[i],
    top_logprobs: Object.entries(scores.top_logprobs[i] ?? {})
      .map(([t, p]) => ({ token: t, logprob: p }))
      .sort((a, b) => b.logprob - a.logprob), // an object puts what looks like a number first
  }));
}

function take(out, delta, scores) {
  out.content += delta.content ?? '';
  out.reasoning += delta.reasoning_content ?? '';
  for (const c of delta.tool_calls ?? []) {
    const call = (out.calls[c.index] ??= { id: '', name: '', arguments: '', result: null });
    call.id = c.id ?? call.id;
    call.name += c.function?.name ?? '';
    call.arguments += c.function?.arguments ?? '';
  }
  for (const s of scores ?? []) out.tokens.push([s.token, s.logprob, s.top_logprobs.map(t => [t.token, t.logprob])]);
}
