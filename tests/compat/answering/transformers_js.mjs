// Answer a request with transformers.js: the same code in Node and in a browser.
//
// transformers: the library, as imported there; its `env` is set by the caller.
// request: cases by name, as `asking.py` writes them; `name` of each is what the library finds the model by.

const TASKS = {
  'token-classification': ['AutoModelForTokenClassification', 'token-classification', ['logits']],
  'question-answering': ['AutoModelForQuestionAnswering', 'question-answering', ['start_logits', 'end_logits']],
};
const SEQUENCE = ['AutoModelForSequenceClassification', 'text-classification', ['logits']];

// What transformers.js makes file names of: onnx/<model_file_name><suffix of dtype>.onnx
const FILES = {
  fp32: {dtype: 'fp32'},
  int8: {dtype: 'q8'},
  fp16: {dtype: 'fp16'},
  fused: {dtype: 'fp32', model_file_name: 'model_fused'},
  'fused-int8': {dtype: 'q8', model_file_name: 'model_fused'},
};

// Of a tokenizer that is not BERT's own it returns segments only on request; without them a pair is one text to the model.
const SEGMENTS = {return_token_type_ids: true};

function tensors(transformers, batch) {
  return Object.fromEntries(Object.entries(batch).map(([name, rows]) => {
    const values = BigInt64Array.from(rows.flat().map(BigInt));
    return [name, new transformers.Tensor('int64', values, [rows.length, rows[0].length])];
  }));
}

function softmax(values) {
  const powers = values.map((value) => Math.exp(value - Math.max(...values)));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

// What its user writes where the pipeline does not do: it takes no pairs, and makes a softmax of a regression's one output.
async function decideByHand(model, tokenizer, {kind, texts, pairs}) {
  const found = [];
  for (const [at, text] of texts.entries()) {
    const inputs = tokenizer(text, {text_pair: pairs?.[at] ?? null, truncation: true, ...SEGMENTS});
    const [values] = (await model(inputs)).logits.tolist();
    const scores = kind === 'regression' ? values : softmax(values);
    found.push(scores.map((score, number) => ({label: model.config.id2label[number], score})));
  }
  return found;
}

async function decide(transformers, request, options) {
  const {kind, texts, pairs} = request;
  const [, task] = TASKS[kind] ?? SEQUENCE;
  const pipe = await transformers.pipeline(task, request.name, options);
  const found = [];
  for (const [at, text] of texts.entries()) {
    if (kind === 'question-answering') found.push(await pipe(text, pairs[at]));
    else if (kind === 'token-classification') found.push(await pipe(text, {ignore_labels: []}));
    else found.push((await pipe([text], {top_k: null}))[0]);
  }
  await pipe.dispose();
  return found;
}

async function answerCase(transformers, request, device) {
  const tokenizer = await transformers.AutoTokenizer.from_pretrained(request.name);
  const tokens = {input_ids: [], token_type_ids: []};
  for (const [at, text] of request.texts.entries()) {
    const pair = request.pairs === null ? {} : {text_pair: request.pairs[at]};
    const row = tokenizer(text, {...pair, truncation: true, return_tensor: false, ...SEGMENTS});
    for (const name of Object.keys(tokens)) tokens[name].push(row[name].map(Number));
  }
  const [model, , outputs] = TASKS[request.kind] ?? SEQUENCE;
  const graphs = {};
  for (const graph of Object.keys(request.graphs)) {
    const options = {...FILES[graph], ...device};
    try {
      const loaded = await transformers[model].from_pretrained(request.name, options);
      const found = [];
      for (const batch of request.batches) {
        const result = await loaded(tensors(transformers, batch));
        found.push(Object.fromEntries(outputs.map((name) => [name, result[name].tolist()])));
      }
      const byHand = request.kind === 'regression' || (request.pairs !== null && request.kind !== 'question-answering');
      const decisions = byHand
        ? await decideByHand(loaded, tokenizer, request)
        : await decide(transformers, request, options);
      graphs[graph] = {outputs: found, decisions};
      await loaded.dispose();
    } catch (error) {
      graphs[graph] = {error: String(error).slice(0, 500)};
    }
  }
  return {tokens, graphs};
}

export async function answer(transformers, request, device) {
  const cases = {};
  for (const [name, one] of Object.entries(request)) cases[name] = await answerCase(transformers, one, {device});
  return cases;
}
