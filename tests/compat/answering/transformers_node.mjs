// Answer a request with transformers.js in Node.   node transformers_node.mjs REQUEST ANSWER, run in the folder of its modules
import {readFile, writeFile} from 'node:fs/promises';
import {createRequire} from 'node:module';
import path from 'node:path';

import {answer} from './transformers_js.mjs';

const require = createRequire(path.resolve('package.json'));
const transformers = require('@huggingface/transformers');
const [requestFile, answerFile] = process.argv.slice(2);
const request = JSON.parse(await readFile(requestFile, 'utf8'));

transformers.env.allowRemoteModels = false;
transformers.env.localModelPath = path.dirname(Object.values(request)[0].folder) + path.sep;
const version = async (name) => JSON.parse(await readFile(`node_modules/${name}/package.json`, 'utf8')).version;
const software = {
  'transformers.js': transformers.env.version,
  'onnxruntime-node': await version('onnxruntime-node'),
  node: process.version,
};
const cases = await answer(transformers, request, 'cpu');
await writeFile(answerFile, JSON.stringify({software, cases}));
