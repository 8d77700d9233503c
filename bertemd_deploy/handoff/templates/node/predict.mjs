// Texts in, answers out, with onnxruntime-node and @huggingface/tokenizers.
//
//   node predict.mjs "a text" "another text"             prints one JSON object a line; texts may come on stdin, one a line
//   node predict.mjs --pair $'first text\tsecond text'   a tab between the texts of a pair
//
//   import {load} from './predict.mjs';
//   const predictor = await load();
//   await predictor.predict(['a text']);                 [{label, score, scores}]
//
// The folder `model` beside this file holds the graph, the tokenizer and model.json, which says what the model decides.
import {createHash} from 'node:crypto';
import {readFileSync, realpathSync} from 'node:fs';
import {availableParallelism} from 'node:os';
import path from 'node:path';
import {fileURLToPath} from 'node:url';
import {parseArgs} from 'node:util';

import {Tokenizer} from '@huggingface/tokenizers';
import onnxruntime from 'onnxruntime-node';

const HERE = path.dirname(fileURLToPath(import.meta.url));
const BATCH = 32; // rows run together
const RARE_IDEOGRAPHS = /[\u{20000}-\u{2a6df}\u{2a700}-\u{2b81f}\u{2b920}-\u{2ceaf}\u{2f800}-\u{2fa1f}]/gu;

// What was asked cannot be answered; the message says why.
export class InputError extends Error {}

// Load what lies in a folder; threads: of ONNX Runtime, by default what this process may use.
export async function load(folder = path.join(HERE, 'model'), {threads = usableThreads()} = {}) {
  const model = JSON.parse(readFileSync(path.join(folder, 'model.json'), 'utf8'));
  const tokenizer = new Tokenizer(JSON.parse(checked(folder, model, 'tokenizer.json').toString('utf8')), {});
  const open = (name) => onnxruntime.InferenceSession.create(checked(folder, model, name), {
    executionProviders: ['cpu'],
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    logSeverityLevel: 4,
    extra: {session: {force_spinning_stop: '1'}},
  });
  if (model.isa.length > 0) await checkSums(await open('saturation.onnx'), model.isa);
  return new Predictor(model, tokenizer, await open('model.onnx'));
}

class Predictor {
  constructor(model, tokenizer, session) {
    Object.assign(this, {model, tokenizer, session});
  }

  // Return one record per text, in order; pairs: second texts.
  async predict(texts, pairs = null) {
    this.#check(texts, pairs);
    const rows = texts.map((text, at) => this.#encode(pairs === null ? [text] : [text, pairs[at]]));
    const found = new Array(rows.length);
    const order = rows.map((_, at) => at).sort((one, other) => rows[one].ids.length - rows[other].ids.length);
    for (let start = 0; start < order.length; start += BATCH) {
      const chosen = order.slice(start, start + BATCH);
      const logits = await this.#run(chosen.map((at) => rows[at]));
      chosen.forEach((at, place) => {
        found[at] = decide(logits[place], this.model);
      });
    }
    return found;
  }

  #check(texts, pairs) {
    for (const given of pairs === null ? [texts] : [texts, pairs]) {
      if (!Array.isArray(given)) throw new InputError('give a list of texts, [text].');
      given.forEach((text, at) => {
        if (typeof text !== 'string') throw new InputError(`text ${at + 1} should be text, found ${typeof text}.`);
        if (!text.isWellFormed()) throw new InputError(`text ${at + 1} is not valid Unicode.`);
      });
    }
    if (pairs !== null && pairs.length !== texts.length) {
      throw new InputError(`${texts.length} texts but ${pairs.length} pairs.`);
    }
    if (texts.length > 0 && this.model.pairs !== null && (pairs !== null) !== this.model.pairs) {
      throw new InputError(`this model takes ${this.model.pairs ? 'two texts: pairs' : 'single texts'}.`);
    }
  }

  // Return token and segment ids, cut as in training. The tokenizer lower-cases a last sigma, and parts ideographs beyond
  // 16 bits, otherwise than the one the model was trained with.
  #encode(texts) {
    const {frames, normalizer, max_length: longest} = this.model;
    const segments = texts.map((text) => {
      let plain = normalizer.lowers ? text.replaceAll('Σ', 'σ') : text;
      if (normalizer.parts_ideographs) plain = plain.replace(RARE_IDEOGRAPHS, ' $& ');
      return this.tokenizer.encode(plain, {add_special_tokens: false}).ids;
    });
    const frame = frames[texts.length - 1];
    const kept = cut(segments, Math.max(0, longest - frame.filter((part) => 'token' in part).length));
    const parts = frame.map((part) => ({ids: 'token' in part ? [part.token] : kept[part.sequence], type: part.type}));
    return {ids: parts.flatMap((part) => part.ids), types: parts.flatMap((part) => part.ids.map(() => part.type))};
  }

  async #run(rows) {
    const width = rows.at(-1).ids.length;
    const values = {
      input_ids: (row, at) => row.ids[at] ?? this.model.pad_id,
      attention_mask: (row, at) => (at < row.ids.length ? 1 : 0),
      token_type_ids: (row, at) => row.types[at] ?? 0,
    };
    const feeds = Object.fromEntries(this.model.inputs.map((name) => {
      const data = rows.flatMap((row) => Array.from({length: width}, (_, at) => BigInt(values[name](row, at))));
      return [name, new onnxruntime.Tensor('int64', BigInt64Array.from(data), [rows.length, width])];
    }));
    const {logits} = await this.session.run(feeds, ['logits']);
    const outputs = logits.dims[1];
    return rows.map((_, at) => Array.from(logits.data.subarray(at * outputs, (at + 1) * outputs)));
  }
}

// Cut one or two lists of ids to `room` together, the longer one first.
export function cut(segments, room) {
  const lengths = segments.map((ids) => ids.length);
  if (lengths.reduce((sum, length) => sum + length, 0) <= room) return segments;
  if (segments.length === 1) return [segments[0].slice(0, room)];
  const shorter = lengths[0] <= lengths[1] ? 0 : 1;
  const kept = [0, 0];
  kept[shorter] = Math.min(lengths[shorter], Math.floor(room / 2));
  kept[1 - shorter] = room - kept[shorter];
  return segments.map((ids, at) => ids.slice(0, kept[at]));
}

function decide(logits, {kind, labels}) {
  if (!logits.every(Number.isFinite)) throw new Error('the graph answered with values that are not finite.');
  if (kind === 'regression') return {label: null, score: logits[0], scores: {}};
  const named = (scores) => Object.fromEntries(labels.map((label, at) => [label, scores[at]]));
  if (kind === 'multilabel') {
    const scores = logits.map((logit) => 1 / (1 + Math.exp(-logit)));
    const order = logits.map((_, at) => at).sort((one, other) => logits[other] - logits[one]);
    const chosen = order.filter((at) => logits[at] > 0).map((at) => labels[at]);
    return {label: chosen[0] ?? null, labels: chosen, score: scores[order[0]], scores: named(scores)};
  }
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const total = powers.reduce((sum, power) => sum + power, 0);
  const scores = powers.map((power) => power / total);
  const best = scores.indexOf(Math.max(...scores));
  return {label: labels[best], score: scores[best], scores: named(scores)};
}

// Return a file's bytes, after checking its SHA-256.
function checked(folder, model, name) {
  const bytes = readFileSync(path.join(folder, name));
  if (createHash('sha256').update(bytes).digest('hex') !== model.files[name]) {
    throw new Error(`${path.join(folder, name)}: truncated or changed. Copy the whole folder again.`);
  }
  return bytes;
}

// Refuse a CPU that clips sums of int8 products: the model would not be as accurate as it was measured.
async function checkSums(session, isa) {
  const {c} = await session.run({
    a: new onnxruntime.Tensor('uint8', new Uint8Array(4).fill(255), [1, 4]),
    b: new onnxruntime.Tensor('int8', new Int8Array(32).fill(127), [4, 8]),
  });
  if (c.data.some((sum) => sum !== 4 * 255 * 127)) {
    throw new Error(`model.onnx needs a CPU with one of ${isa.join(', ')}. Bundle an artifact of --target portable.`);
  }
}

// Return the CPUs this process may use, as its affinity mask and its container's quota say.
function usableThreads() {
  try {
    const [quota, period] = readFileSync('/sys/fs/cgroup/cpu.max', 'utf8').split(' ').map(Number);
    if (quota > 0) return Math.max(1, Math.min(availableParallelism(), Math.ceil(quota / period)));
  } catch {
    // another system, or another version of cgroups
  }
  return availableParallelism();
}

function linesOf(text) {
  return text === '' ? [] : text.replace(/\r?\n$/, '').split(/\r?\n/);
}

async function main() {
  const options = {pair: {type: 'boolean', default: false}, threads: {type: 'string'}};
  const {values, positionals} = parseArgs({options, allowPositionals: true});
  const given = positionals.length > 0 ? positionals : linesOf(readFileSync(0, 'utf8'));
  const predictor = await load(undefined, values.threads ? {threads: Number(values.threads)} : {});
  const parted = given.map((text) => text.split(/\t(.*)/s));
  if (values.pair && parted.some((parts) => parts.length < 2)) throw new InputError('a pair needs a tab between its texts.');
  const found = values.pair
    ? await predictor.predict(parted.map(([first]) => first), parted.map(([, second]) => second))
    : await predictor.predict(given);
  for (const record of found) console.log(JSON.stringify(record));
}

if (process.argv[1] && realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {
  main().catch((error) => {
    console.error(`error: ${error.message}`);
    process.exitCode = 1;
  });
}
