// Answer a request with onnxruntime-node.   node onnxruntime_node.cjs REQUEST ANSWER, run in the folder of its modules
const {readFileSync, writeFileSync} = require('node:fs');
const {createRequire} = require('node:module');
const path = require('node:path');

const load = createRequire(path.resolve('package.json'));
const onnxruntime = load('onnxruntime-node');
const [requestFile, answerFile] = process.argv.slice(2);

function tensor(rows) {
  return new onnxruntime.Tensor('int64', BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, rows[0].length]);
}

function nested(values, dims) {
  if (dims.length === 1) return Array.from(values);
  const size = values.length / dims[0];
  return Array.from({length: dims[0]}, (_, at) => nested(values.slice(at * size, (at + 1) * size), dims.slice(1)));
}

async function outputs(file, batches) {
  const session = await onnxruntime.InferenceSession.create(file, {intraOpNumThreads: 1, logSeverityLevel: 4});
  const found = [];
  for (const batch of batches) {
    const feeds = Object.fromEntries(Object.entries(batch).map(([name, rows]) => [name, tensor(rows)]));
    const results = await session.run(feeds);
    found.push(Object.fromEntries(Object.entries(results).map(([name, value]) => [name, nested(value.data, value.dims)])));
  }
  return found;
}

async function main() {
  const cases = {};
  for (const [name, request] of Object.entries(JSON.parse(readFileSync(requestFile, 'utf8')))) {
    const graphs = {};
    for (const [graph, file] of Object.entries(request.graphs)) {
      try {
        graphs[graph] = {outputs: await outputs(path.join(request.folder, file), request.batches)};
      } catch (error) {
        graphs[graph] = {error: String(error).slice(0, 500)}; // an old release that cannot is one of the answers
      }
    }
    cases[name] = {graphs};
  }
  const {version} = JSON.parse(readFileSync(path.resolve('node_modules/onnxruntime-node/package.json'), 'utf8'));
  writeFileSync(answerFile, JSON.stringify({software: {'onnxruntime-node': version, node: process.version}, cases}));
}

main();
